"""A Hugging Face hub on this machine, as far as an upload asks for it: what came to it can be looked at."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"
OID = "0" * 40


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """Attributes:
        answers: what to answer instead, by the beginning of a path: a status.
        words: what it says to these.
        silent: the beginning of the paths that get no answer at all.
        asked: every path that was asked for.
    """

    address: str = ""
    account: dict[str, Any] = field(default_factory=lambda: {"name": "me", "orgs": [{"name": "us"}]})
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    words: str = "no"
    silent: str = "nothing"
    asked: list[str] = field(default_factory=list)


@contextmanager
def running() -> Iterator[FakeHub]:
    hub, ended = FakeHub(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(body)

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            if path.startswith(hub.silent):
                ended.wait()
                self.close_connection = True
                return
            status = next((status for start, status in hub.answers.items() if path.startswith(start)), None)
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/objects/")
            if status is not None or not known:
                self.answer(status or 401, {"error": hub.words})
            else:
                self.answer(*respond(hub, self.command, path, body))

        do_GET = do_POST = do_PUT = do_HEAD = handle_one

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def respond(hub: FakeHub, method: str, path: str, body: bytes) -> tuple[int, object]:
    if path == "/api/whoami-v2":
        return 200, hub.account
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or hub.account['name']}/{wanted['name']}"
        if name in hub.repositories:
            return 409, {"error": "exists", "url": f"{hub.address}/{name}"}
        hub.repositories[name] = Repository(wanted.get("visibility") == "private" or wanted.get("private") is True)
        return 200, {"url": f"{hub.address}/{name}"}
    if path.startswith("/objects/"):
        assert hashlib.sha256(body).hexdigest() == path.removeprefix("/objects/")
        hub.objects[path.removeprefix("/objects/")] = body
        return 200, {}
    if path.endswith(".git/info/lfs/objects/batch"):
        objects = json.loads(body)["objects"]
        actions = [{**one, "actions": {"upload": {"href": f"{hub.address}/objects/{one['oid']}"}}} for one in objects]
        return 200, {"transfer": "basic", "objects": actions}
    name, _, rest = path.removeprefix("/api/models/").partition("/")
    name, action = f"{name}/{rest.partition('/')[0]}", rest.partition("/")[2]
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    if action.startswith("preupload/"):
        files = [{"path": one["path"], "shouldIgnore": False, "oid": None,
                  "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                 for one in json.loads(body)["files"]]  # fmt: skip
        return 200, {"files": files, "commitOid": OID}
    if action.startswith("commit/"):
        return 200, committed(hub, name, body)
    return 200, {"id": name, "private": hub.repositories[name].private, "sha": OID}


def committed(hub: FakeHub, name: str, body: bytes) -> dict[str, Any]:
    repository = hub.repositories[name]
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            repository.commits.append(value["summary"])
        elif line["key"] == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            repository.files[value["path"]] = hub.objects[value["oid"]]
    return {"success": True, "commitOid": OID, "commitUrl": f"{hub.address}/{name}/commit/{OID}"}
