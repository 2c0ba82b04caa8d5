"""Processes that are started together end together, and the one that is lost is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from helpers import launch
from helpers.config.paths import ROOT

BEATING = """
import os, signal, sys, time
from helpers.heartbeat import Pulse
pulse = Pulse()
pulse.start()
rank = int(os.environ["RANK"])
"""


@pytest.fixture
def script(tmp_path):
    def write(body: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{BEATING}{textwrap.dedent(body)}")
        return str(path)

    return write


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_exit_code_of_all_is_passed_on(script, code):
    assert launch.launch(2, [script(f"sys.exit({code})")]) == code


def test_the_processes_find_each_other(script, tmp_path):
    body = f"""
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        number = torch.tensor(dist.get_rank() + 1)
        dist.all_reduce(number)
        open({str(tmp_path)!r} + f"/{{rank}}", "w").write(str(number.item()))
        dist.destroy_process_group()
    """
    assert launch.launch(2, [script(body)]) == 0
    assert [(tmp_path / name).read_text() for name in "01"] == ["3", "3"]


def test_one_that_is_killed_is_named_and_ends_the_others(script, capfd):
    began = time.monotonic()
    assert launch.launch(3, [script("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(600)")]) == launch.LOST
    assert "rank 1" in (said := capfd.readouterr().err) and "SIGKILL" in said
    assert time.monotonic() - began < 60


def test_one_that_fails_is_named_with_its_last_words_and_its_code(script, capfd):
    assert launch.launch(2, [script("sys.exit('the disk is full') if rank == 1 else time.sleep(600)")]) == 1
    assert "rank 1" in (said := capfd.readouterr().err) and "the disk is full" in said


def test_one_that_is_frozen_is_named_within_a_minute(script, capfd, monkeypatch):
    assert launch.SILENT_SECONDS < 60
    monkeypatch.setattr(launch, "SILENT_SECONDS", 3.0)
    frozen = script("os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else time.sleep(600)")
    assert launch.launch(2, [frozen]) == launch.LOST
    assert "rank 1" in (said := capfd.readouterr().err) and "no sign of life" in said


def test_one_that_lives_but_does_not_come_to_where_the_others_wait_is_named(script, capfd, monkeypatch):
    monkeypatch.setattr(launch, "SILENT_SECONDS", 3.0)
    assert launch.launch(2, [script("pulse.reached = 8 - rank\ntime.sleep(600)")]) == launch.LOST
    assert "rank 1" in (said := capfd.readouterr().err) and "where the others wait" in said


def test_one_that_lags_behind_but_moves_is_waited_for(script, monkeypatch):
    monkeypatch.setattr(launch, "SILENT_SECONDS", 3.0)
    lagging = "pulse.reached = 8\nfor step in range(0 if rank == 0 else 8):\n  pulse.reached = step\n  time.sleep(1)"
    assert launch.launch(2, [script(f"{lagging}\ntime.sleep(8 * (rank == 0))")]) == 0


def test_nobody_is_taken_for_frozen_because_the_launcher_was(script, tmp_path):
    code = "from helpers import launch; import sys; launch.SILENT_SECONDS = 6; sys.exit(launch.launch(2, sys.argv[1:]))"
    body = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').close()\ntime.sleep(12)"
    process = subprocess.Popen([sys.executable, "-c", code, script(body)], cwd=ROOT)
    while not all((tmp_path / name).exists() for name in "01"):
        time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0


def test_the_first_that_failed_is_blamed_whatever_the_others_then_end_with(script, capfd):
    body = "time.sleep(2 * (1 - rank))\nos.kill(os.getpid(), signal.SIGKILL if rank else signal.SIGABRT)"
    assert launch.launch(2, [script(body)]) == launch.LOST
    assert "rank 1" in (said := capfd.readouterr().err) and "SIGABRT" not in said


def test_one_that_does_not_notice_that_the_others_were_asked_to_end_is_ended(script, monkeypatch):
    monkeypatch.setattr(launch, "SILENT_SECONDS", 3.0)
    assert launch.launch(2, [script("time.sleep(600 * rank)\nsys.exit(143)")]) == 143


def test_the_trainer_gives_signs_of_life_before_it_imports_what_takes_long():
    heard, descriptor = os.pipe()
    with os.fdopen(heard) as beats:
        environ = {**os.environ, "FLOYDTUNER_HEARTBEAT": str(descriptor)}
        command = [sys.executable, "train_sd2x.py", "--no_such_option=1"]
        refused = subprocess.run(command, cwd=ROOT, env=environ, pass_fds=[descriptor], capture_output=True)
        os.close(descriptor)
        assert refused.returncode == 2 and beats.readline() == "0\n"


def test_slow_ones_are_not_taken_for_frozen(script, monkeypatch):
    monkeypatch.setattr(launch, "SILENT_SECONDS", 3.0)
    assert launch.launch(2, [script("time.sleep(5)")]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_of_them_once(script, tmp_path, number):
    body = f"""
        def stop(number, frame):
            with open({str(tmp_path)!r} + f"/{{rank}}", "a") as file:
                file.write("x")
            time.sleep(rank)  # the first to end is no reason to end the other
            sys.exit(128 + number)
        signal.signal({int(number)}, stop)
        open({str(tmp_path)!r} + f"/ready{{rank}}", "w").close()
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-m", "helpers.launch", "2", script(body)], cwd=ROOT)
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert [(tmp_path / name).read_text() for name in "01"] == ["x", "x"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_not_heard_ends_all_of_them_at_once_with_its_code(script, tmp_path, number, capfd):
    body = f"""
        signal.signal({int(number)}, signal.SIG_IGN if rank else signal.SIG_DFL)  # as one that waits in C++ is deaf
        open({str(tmp_path)!r} + f"/{{rank}}", "w").close()
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-m", "helpers.launch", "2", script(body)], cwd=ROOT)
    while not all((tmp_path / name).exists() for name in "01"):
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(8) == 128 + number
    assert "was killed" not in capfd.readouterr().err


def test_they_end_when_their_launcher_is_gone(script, tmp_path):
    body = f"""
        open({str(tmp_path)!r} + f"/{{rank}}", "w").write(str(os.getpid()))
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-m", "helpers.launch", "2", script(body)], cwd=ROOT)
    paths = [tmp_path / name for name in "01"]
    while not all(path.exists() and path.read_text() for path in paths):
        time.sleep(0.1)
    process.kill()
    deadline = time.monotonic() + 20
    pids = [int(path.read_text()) for path in paths]
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
