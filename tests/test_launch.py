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
