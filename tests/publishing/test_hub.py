"""What is uploaded, to whom, and what is told where that fails: against a hub on this machine."""

from __future__ import annotations

import json
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from helpers.config.load import load
from helpers.models.bitfit import BIASES_FILE
from helpers.models.kohya import KOHYA_FILE
from helpers.models.lora import LORA_FILE
from helpers.publishing.card import SAMPLES
from helpers.publishing.hub import WAITING, Hub, Uploads
from helpers.training import accounts, loop
from helpers.training.accounts import hub_name
from tests.publishing.fake_hub import TOKEN, FakeHub, Repository, running

PUSH = {"push_to_hub": True, "hub_model_id": "my-subject", "validation_prompt": "a red circle"}
CREATE, COMMIT = "/api/repos/create", "/api/models/me/my-subject/commit"


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    with running() as hub:
        for name, value in (("ENDPOINT", hub.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def private_words(*paths: Path) -> list[bytes]:
    """What must not leave this machine."""
    return [str(path).encode() for path in (*paths, Path.home(), Path(__file__).parents[2])] + [b"known_", b"data.json"]


def test_a_finished_run_uploads_its_result_its_card_and_samples_privately_and_nothing_else(
    trainer, hub, tmp_path, smaller_model, photos, capsys
):
    flags = {"pretrained_model_name_or_path": smaller_model, "checkpointing_steps": 1, "push_checkpoints_to_hub": True}
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / KOHYA_FILE).write_bytes(b"of an earlier training")
    assert trainer(**PUSH, **flags, checkpoints_total_limit=1) == 0
    output, [(name, repository)] = tmp_path / "output", hub.repositories.items()
    assert (name, repository.private) == ("me/my-subject", True)
    result = {"README.md", LORA_FILE, "sample_images/1.png", "sample_images/before_and_after.png"}
    assert repository.files.keys() == result | {f"checkpoint-{step}/{LORA_FILE}" for step in (1, 2)}
    assert all(repository.files[path] == (output / path).read_bytes() for path in result)
    assert repository.files[f"checkpoint-2/{LORA_FILE}"] == (output / "checkpoint-2" / LORA_FILE).read_bytes()
    assert repository.files[f"checkpoint-1/{LORA_FILE}"] != repository.files[f"checkpoint-2/{LORA_FILE}"]
    for path, content in repository.files.items():
        assert [word for word in private_words(tmp_path, photos, smaller_model) if word in content] == [], path
    assert b'place = "me/my-subject"' in repository.files["README.md"]
    assert "huggingface.co/me/my-subject    the same on the hub, for your account alone" in capsys.readouterr().out
    assert not (output / WAITING).exists()


def test_of_a_full_type_the_whole_pipeline_is_uploaded_and_to_everybody_if_that_was_asked_for(
    trainer, hub, tmp_path, smaller_model
):
    flags = {"model_type": "deepfloyd-full", "lora_rank": None, "pretrained_model_name_or_path": smaller_model}
    assert trainer(**PUSH | {"hub_model_id": "us/full", "hub_private": False}, **flags) == 0
    [(name, repository)], pipeline = hub.repositories.items(), tmp_path / "output" / "pipeline"
    assert (name, repository.private) == ("us/full", False)
    local = {path.relative_to(pipeline).as_posix(): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    assert repository.files == local and {"README.md", "model_index.json"} < local.keys()
    private = private_words(tmp_path, smaller_model)
    assert [(path, word) for path, content in local.items() for word in private if word in content] == []


@pytest.mark.parametrize("base, flags, made", [
    ("smaller_model", {"model_type": "deepfloyd-full", "use_bitfit": True, "lora_rank": None}, {BIASES_FILE}),
    ("tiny_sd", {"model_type": "lora", "resolution": 64, "export": "kohya"}, {LORA_FILE, KOHYA_FILE}),
], ids=["bitfit", "kohya"])  # fmt: skip
def test_each_kind_uploads_what_it_made(trainer, hub, request, base, flags, made):
    base = {"pretrained_model_name_or_path": request.getfixturevalue(base), "validation_prompt": None}
    assert trainer(**PUSH | base | flags, max_train_steps=1) == 0
    assert hub.repositories["me/my-subject"].files.keys() == made | {"README.md"}


def test_pictures_that_were_made_of_the_dataset_stay_here(trainer, hub, tmp_path, tiny_stage2, photos):
    data = tmp_path / "stage2.json"
    data.write_text(json.dumps([{"id": "photos", "instance_data_dir": str(photos), "caption_strategy": "textfile"}]))
    flags = {"model_type": "deepfloyd-stage2-lora", "pretrained_model_name_or_path": tiny_stage2, "resolution": 64}
    flags |= {"data_backend_config": data, "validation_resolution": "64", "num_eval_images": 1, "max_train_steps": 1}
    kept = tmp_path / "output" / SAMPLES / "1.png"  # of a training before, beside a card that its user made his own
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert trainer(**PUSH, **flags) == 0
    [repository] = hub.repositories.values()
    assert repository.files.keys() == {"README.md", LORA_FILE}
    assert b"known_" not in repository.files["README.md"] and b".png)" not in repository.files["README.md"]


@pytest.mark.parametrize("spoil, words", [
    ({"token": ""}, ["PUSH_TO_HUB", "no account of the Hugging Face hub is known here", "hf auth login"]),
    ({"token": "hf_other"}, ["PUSH_TO_HUB", "does not know the token", "hf auth login"]),
    ({"answers": {"/api/whoami": 500}}, ["PUSH_TO_HUB", "answers with error 500"]),
    ({"address": "http://127.0.0.1:9"}, ["PUSH_TO_HUB", "cannot be used (ConnectError"]),
    ({"offline": True}, ["PUSH_TO_HUB", "HF_HUB_OFFLINE"]),
    ({"role": "read"}, ["PUSH_TO_HUB", "the token of me may only read"]),
    ({"flags": {"hub_model_id": "them/x"}}, ["HUB_MODEL_NAME", "'them/x'", "one of me, us"]),
    ({"public": True}, ["HUB_MODEL_NAME", "me/my-subject, which is public", "HUB_PRIVATE"]),
], ids=lambda value: next(iter(value)))  # fmt: skip
def test_what_an_upload_lacks_is_told_before_the_training(
    trainer, hub, tmp_path, monkeypatch, tmp_path_factory, capsys, spoil, words
):
    if spoil.get("token") == "":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    elif "token" in spoil:
        monkeypatch.setenv("HF_TOKEN", spoil["token"])
    hub.answers |= spoil.get("answers", {})
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", spoil.get("address", hub.address))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", "offline" in spoil)
    hub.account |= {"auth": {"accessToken": {"role": spoil.get("role", "write")}}}
    if "public" in spoil:
        hub.repositories["me/my-subject"] = Repository(private=False)
    before = set(tmp_path.rglob("*"))
    assert trainer(**PUSH | spoil.get("flags", {})) == 2
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == []
    assert set(tmp_path.rglob("*")) == before and not [path for path in hub.asked if "commit" in path]


@pytest.mark.parametrize("place, status, words", [
    (COMMIT, 403, "may not write there (error 403: no room left)"), (CREATE, 500, "error 500"),
])  # fmt: skip
def test_an_upload_that_fails_is_told_with_the_command_that_does_it_and_ends_no_run(
    trainer, hub, tmp_path, smaller_model, capfd, place, status, words
):
    hub.answers[place], hub.words = status, "no room left"
    flags = {"max_train_steps": 1, "validation_prompt": None, "pretrained_model_name_or_path": smaller_model}
    assert trainer(**PUSH | flags, checkpointing_steps=1, push_checkpoints_to_hub=True) == 0
    said = "".join(capfd.readouterr())
    assert words in said and "Nothing is lost" in said and "checkpoint-1 was not uploaded to me/my-subject" in said
    [command] = [line.strip() for line in said.splitlines() if line.startswith("  hf upload ")]
    assert shlex.split(command)[:6] == ["hf", "upload", "--private", "me/my-subject", str(tmp_path / "output"), "."]
    assert f"--include={LORA_FILE}" in command and "Finished after 1 steps" in said
    assert (tmp_path / "output" / LORA_FILE).exists()


def test_without_a_connection_and_to_a_repository_that_went_public_nothing_is_uploaded(
    hub, tmp_path, capfd, monkeypatch
):
    (tmp_path / "unet").mkdir()
    hub.repositories["me/x"] = Repository(private=False)
    assert not Hub("me/x", private=True).upload_result(tmp_path, ("*",), 1)
    assert "me/x is public by now" in "".join(capfd.readouterr()) and hub.repositories["me/x"].files == {}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not Hub("me/x", private=False).upload_result(tmp_path, ("*",), 1)
    said = "".join(capfd.readouterr())
    assert "ConnectError" in said and "hf upload me/x" in said


def test_dry_runs_and_runs_that_were_interrupted_upload_no_result(trainer, hub, tmp_path, smaller_model, monkeypatch):
    flags = {"pretrained_model_name_or_path": smaller_model, "validation_prompt": None}
    assert trainer(**PUSH | flags, dry_run=True) == 0
    assert hub.asked == []
    step = loop.training_loss

    def then_stop(*arguments):
        (tmp_path / "output" / "stop").touch()
        return step(*arguments)

    monkeypatch.setattr(loop, "training_loss", then_stop)
    assert trainer(**PUSH | flags, max_train_steps=3, push_checkpoints_to_hub=True) == 143
    assert hub.repositories == {} and (tmp_path / "output" / "checkpoint-1").exists()


def test_checkpoints_that_are_deleted_meanwhile_are_uploaded_all_the_same(hub, tmp_path):
    hub.repositories["me/x"] = Repository(private=True)
    uploads = Uploads(Hub("me/x", private=True), tmp_path)
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in (LORA_FILE, "state.safetensors", "state.json", "manifest.json"):
            (checkpoint / name).write_bytes(bytes([step]))
        uploads.add(checkpoint)
        shutil.rmtree(checkpoint)
    (tmp_path / LORA_FILE).write_bytes(b"result")
    assert uploads.finish(tmp_path, (LORA_FILE,), 3, stopped=lambda: False)
    files = {f"checkpoint-{step}/{LORA_FILE}": bytes([step]) for step in (1, 2, 3)}
    assert hub.repositories["me/x"].files == {**files, LORA_FILE: b"result"} and not (tmp_path / WAITING).exists()
    assert hub.repositories["me/x"].commits[-1] == "FloydTuner: step 3", "the result comes last"


def test_a_hub_that_is_silent_is_given_up_and_left_off_when_asked(
    trainer, hub, tmp_path, smaller_model, monkeypatch, capfd
):
    flags = {"max_train_steps": 1, "validation_prompt": None, "pretrained_model_name_or_path": smaller_model}
    monkeypatch.setattr(accounts, "PATIENCE", 0.2)
    hub.silent = "/api/whoami"
    assert trainer(**PUSH | flags) == 2
    assert "PUSH_TO_HUB" in (said := capfd.readouterr().err) and "cannot be used (ReadTimeout" in said
    hub.silent = CREATE
    assert trainer(**PUSH | flags) == 0
    assert "cannot be used (ReadTimeout" in (said := "".join(capfd.readouterr())) and "Nothing is lost" in said
    monkeypatch.setattr(accounts, "PATIENCE", 100.0)
    stopper = threading.Thread(target=_stop_at, args=(hub, CREATE, tmp_path / "output" / "stop"))
    hub.asked.clear()
    stopper.start()
    assert trainer(**PUSH | flags, push_checkpoints_to_hub=True) == 0
    stopper.join()
    assert "me/my-subject is left off. Nothing is lost" in "".join(capfd.readouterr())
    assert not (tmp_path / "output" / WAITING).exists() and hub.repositories == {}


def test_the_next_run_deletes_what_an_interrupted_one_had_still_to_upload(trainer, tmp_path):
    left = tmp_path / "output" / WAITING / "checkpoint-1"
    left.mkdir(parents=True)
    assert trainer(max_train_steps=1, validation_prompt=None) == 0
    assert not left.parent.exists()


def _stop_at(hub: FakeHub, path: str, file: Path) -> None:
    while path not in hub.asked:
        time.sleep(0.05)
    file.touch()


def test_a_disk_without_room_for_what_waits_ends_no_run(hub, tmp_path, monkeypatch, capfd):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / LORA_FILE).touch()
    uploads = Uploads(Hub("me/x", private=True), tmp_path)
    (tmp_path / WAITING).touch()
    uploads.add(checkpoint)
    assert "checkpoint-1 was not uploaded to me/x" in "".join(capfd.readouterr()) and hub.asked == []


@pytest.mark.parametrize("text, name", [
    ("my subject!", "my-subject"), ("..--", "floydtuner"), ("a--b..c", "a-b-c"), ("写真", "floydtuner"),
    ("x" * 300, "x" * 48), ("-a.git", "a"),
])  # fmt: skip
def test_a_repository_is_named_after_the_run_as_the_hub_takes_it(text, name):
    assert hub_name(text) == name
    assert load(["--model_type=deepfloyd-lora", f"--hub_model_id={name}"]).config.run.hub_model_id == name
