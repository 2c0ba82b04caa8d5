"""Signals by real processes; what a run makes of them is in tests/test_trainer.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.training.requests import Interrupted, Requests

ROOT = Path(__file__).parents[2]
GOING_ON = """
import sys, time
from pathlib import Path
from helpers.training.requests import Requests
requests = Requests()
with requests.heard(), requests.deferred():
    print("ready", flush=True)
    told = None
    while True:
        time.sleep(0.01)
        requests.look(Path(sys.argv[1]))
        if requests.stop != told:
            told = requests.stop
            print(told, flush=True)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "file"])
def test_the_first_asks_to_stop_and_any_second_one_ends_at_once(tmp_path, first, second):
    command = [sys.executable, "-c", GOING_ON, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        if first == "file":
            (tmp_path / "stop").touch()
        else:
            process.send_signal(first)
        assert int(process.stdout.readline()) == (signal.SIGTERM if first == "file" else first)
        assert process.poll() is None and not (tmp_path / "stop").exists()
        process.send_signal(second)
        assert process.wait(20) == -second
        assert "Once more ends it at once" in process.stderr.read()


def test_of_several_processes_one_says_that_a_signal_was_heard(tmp_path):
    silent = GOING_ON.replace("Requests()", "Requests(speaks=False)")
    command = [sys.executable, "-c", silent, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert int(process.stdout.readline()) == signal.SIGTERM
        process.kill()
        assert process.stderr.read() == ""


@pytest.mark.parametrize("first, echo", [
    (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM), (signal.SIGINT, signal.SIGHUP),
    (signal.SIGHUP, signal.SIGTERM),
])
def test_the_same_wish_twice_in_a_moment_is_one(tmp_path, first, echo):
    """As by `timeout`, by launchers that hand on what the terminal sent already, by a terminal that is closed."""
    command = [sys.executable, "-c", GOING_ON, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        for _ in range(10):
            time.sleep(0.01)
            process.send_signal(echo)
        assert int(process.stdout.readline()) in (first, echo)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert process.poll() is None, "a terminal that is closed while it saves ends nothing"
        process.kill()


def test_nohup_is_heeded(tmp_path):
    command = ["nohup", sys.executable, "-c", GOING_ON, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert int(process.stdout.readline()) == signal.SIGTERM
        process.kill()


def test_where_there_is_nothing_to_save_a_signal_breaks_off_and_handlers_come_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    requests = Requests()
    with pytest.raises(Interrupted) as caught, requests.heard():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")
    assert caught.value.number == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before


def test_sigusr1_asks_for_a_checkpoint_and_for_nothing_else():
    requests = Requests()
    with requests.heard():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.save and requests.stop is None
