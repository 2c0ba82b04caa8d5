"""No network, no account, nobody at the console: a run on local weights trains to the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs before anything else is imported; notes every attempt, since a library may hide that one failed.
BLOCKED = """\
import os, runpy, socket, sys
def refuse(*words, **more):
    import traceback
    if sys._getframe(1).f_code.co_name == "_has_ipv6":  # urllib3, as it is imported: it binds to this machine only
        raise OSError("no network here")
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write("".join(traceback.format_stack(limit=6)))
    raise OSError("no network here")
class Blocked(socket.socket):
    __init__ = refuse
socket.socket = socket.SocketType = Blocked
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = socket.socketpair = refuse
try:
    os.read(0, 1)
    sys.exit("stdin is open")
except OSError:
    pass
sys.argv[0] = "train_sd2x.py"
sys.path.insert(0, os.getcwd())
runpy.run_path("train_sd2x.py", run_name="__main__")
"""


def without_network() -> list[str]:
    """The words before a command that take its network away altogether; none where that is not permitted."""
    words = ["unshare", "--map-root-user", "--net"]
    tool = shutil.which("unshare")
    permitted = tool and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if permitted else []


@pytest.fixture
def offline(tmp_path, dataloader, tiny_model):
    """Run the trainer in a child process without network, home and stdin; returns it and what it attempted."""

    def run(**flags: object) -> tuple[subprocess.CompletedProcess, str]:
        values = {
            "model_type": "deepfloyd-lora",
            "pretrained_model_name_or_path": tiny_model,
            "data_backend_config": dataloader,
            "cache_dir": tmp_path / "cache",
            "output_dir": tmp_path / "output",
            "train_batch_size": 2,
            "max_train_steps": 2,
            "mixed_precision": "no",
            "lora_rank": 4,
            "validation_prompt": "a red circle",
            "validation_num_inference_steps": 2,
            **flags,
        }
        attempts, home = tmp_path / "attempts", tmp_path / "home"
        home.mkdir()
        environ = {"PATH": os.environ["PATH"], "HOME": str(home), "ATTEMPTS": str(attempts), "OMP_NUM_THREADS": "1"}
        flags = [f"--{name}={value}" for name, value in values.items()]
        command = [*without_network(), sys.executable, "-c", BLOCKED, *flags]
        ended = subprocess.run(
            ["bash", "-c", 'exec "$@" 0<&-', "bash", *command],
            cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280, check=False,
        )
        return ended, attempts.read_text() if attempts.exists() else ""

    return run


def test_a_lora_trains_to_the_end_without_network_account_or_stdin(offline, tmp_path):
    ended, attempts = offline(report_to="tensorboard")
    assert ended.returncode == 0, ended.stderr
    assert attempts == ""
    output = tmp_path / "output"
    assert "Finished after 2 steps" in ended.stdout
    assert (output / "pytorch_lora_weights.safetensors").stat().st_size > 1000
    assert list((output / "logs").rglob("events*"))
    assert list((output / "validation_images" / "step_2").glob("*.png"))
    assert json.loads((output / "run.json").read_text())["options"]["report_to"] == "tensorboard"
    assert not list((tmp_path / "home").rglob("*token*"))


def test_weights_that_need_the_network_end_the_run_in_words_not_in_a_prompt(offline):
    ended, attempts = offline(pretrained_model_name_or_path="DeepFloyd/IF-I-M-v1.0")
    assert ended.returncode == 2, ended.stderr
    assert "cannot be reached" in ended.stderr and 'export MODEL_NAME="/path/to/IF-I-M-v1.0"' in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "no network here" not in ended.stdout and attempts  # the block works: here the network is asked
