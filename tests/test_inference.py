"""`inference.py` as a newcomer runs it: its environment, its demo, its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from PIL import Image

from examples.demo.score import Seen
from examples.demo.score_pictures import seen_in
from helpers.config.paths import ROOT
from helpers.images.recipes import read_recipe


def run(*arguments: str, python: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess:
    command = [*python, str(ROOT / "inference.py"), *arguments]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, **environ}
    return subprocess.run(command, capture_output=True, text=True, env=environ, cwd="/", timeout=120)


@pytest.mark.parametrize("python", [(), (sys.executable,)], ids=["./inference.py", "python inference.py"])
def test_it_is_started_either_way_from_anywhere(python):
    told = run("--promt=x", python=python)
    assert told.returncode == 2 and "did you mean --prompt?" in told.stderr and "Traceback" not in told.stderr


def test_it_goes_on_in_a_python_that_has_what_is_required():
    """One without site packages has not."""
    told = run("--promt=x", python=(sys.executable, "-S"))
    assert told.returncode == 2 and "did you mean --prompt?" in told.stderr, told.stderr


def test_that_python_is_started_where_the_user_is(tmp_path):
    """Paths that are printed as seen from the project's root would lead nowhere there."""
    import inference

    shows = tmp_path / "shows"
    shows.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    shows.chmod(0o755)
    command = ["bash", "-c", inference.CHOOSING % f"PYTHON={shows}", "bash", str(ROOT), "--prompt", "a b"]
    told = subprocess.run(command, capture_output=True, text=True, cwd="/usr")
    assert told.stdout == f"/usr {ROOT / 'inference.py'} --prompt a b\n", told.stderr


def test_help_names_every_option():
    told = run("--help")
    assert told.returncode == 0 and "--upscaler_lora_scale" in told.stdout and "--replay" in told.stdout


def test_the_demo_draws_what_its_prompt_says_through_all_stages(tmp_path):
    import inference

    flags = ["--demo", f"--output={tmp_path}", f"--cache_dir={tmp_path / 'cache'}", "--save_stages"]
    assert inference.main(flags) == 0
    pictures = sorted(tmp_path.glob("*.png"), key=lambda path: Image.open(path).width)
    assert [Image.open(path).width for path in pictures] == [64, 256, 1024]
    assert {seen_in(path) for path in pictures} == {Seen("red", "circle")}
    assert read_recipe(pictures[-1])["options"]["stage1"] == "examples/demo/model"


def test_a_picture_of_a_training_s_validation_is_made_again(trainer, tmp_path, capsys):
    import inference

    flags = {"validation_prompt": "a photo of a red circle", "validation_resolution": 16, "resolution": 64}
    assert trainer(max_train_steps=1, **flags) == 0
    [picture] = (tmp_path / "output" / "validation_images" / "step_1").glob("*_16x16.png")
    assert inference.main([f"--replay={picture}", f"--output={tmp_path / 'again'}"]) == 0
    assert f"The same bytes as {picture}." in capsys.readouterr().out
    [again] = (tmp_path / "again").iterdir()
    assert again.read_bytes() == picture.read_bytes()
    single = tmp_path / "new" / "one.png"
    assert inference.main([f"--replay={picture}", "--dry_run=true", "--steps=3", f"--output={single}"]) == 2
    said = capsys.readouterr().err
    assert "--dry_run" in said and "--steps" in said and not single.parent.exists()
    assert inference.main([f"--replay={picture}", f"--output={single}"]) == 0
    assert single.read_bytes() == picture.read_bytes()


def test_ctrl_c_ends_it_in_a_sentence(tmp_path):
    command = [sys.executable, "inference.py", "--demo", f"--output={tmp_path}", f"--cache_dir={tmp_path / 'cache'}"]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heeding, **pipes) as process:
        said = b""
        while b"stage1:" not in said:
            said += process.stdout.read(4096)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said += process.stdout.read()
    assert process.returncode == 130 and said.rstrip().endswith(b"Interrupted: the pictures that were written stay.")
    assert b"Traceback" not in said
