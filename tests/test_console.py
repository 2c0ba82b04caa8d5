"""A run outlasts whoever listens to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEAKING = """
import contextlib, os, sys
from helpers import console
console.outlast()
from tqdm import tqdm
sys.stdin.readline()
for _ in tqdm(range(3)):
    print("out \\ud800 \\N{CAT FACE}", flush=True)
    tqdm.write("error", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    print("error", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # as a handler of signals does, past Python's streams
        os.write(2, b"error")
    file.write("all was said")
sys.exit(7)
"""


def says(path: Path, stdout: object, stderr: object, leave: bool = False, closed: str = "") -> subprocess.Popen:
    """A process that says much, and then writes a file."""
    shell = ["bash", "-c", f'exec "$0" "$@" {closed}'] if closed else []
    process = subprocess.Popen(
        [*shell, sys.executable, "-c", SPEAKING, str(path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    if leave:
        process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(30) == 7
    assert path.read_text() == "all was said"
    return process


def test_who_listens_hears_everything(tmp_path):
    process = says(tmp_path / "file", subprocess.PIPE, subprocess.PIPE)
    assert process.stdout.read().decode() == "out \\ud800 \\U0001f431\n" * 3
    assert process.stderr.read().count(b"error") == 5


def test_a_pipe_whose_reader_is_gone_ends_nothing(tmp_path):
    says(tmp_path / "file", subprocess.PIPE, subprocess.STDOUT, leave=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a disk that is always full")
def test_a_log_that_finds_no_room_ends_nothing(tmp_path):
    with open("/dev/full", "wb") as full:
        says(tmp_path / "file", full, full)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_what_is_said_into_a_closed_stream_reaches_no_file(tmp_path, closed):
    says(tmp_path / "file", subprocess.DEVNULL, subprocess.DEVNULL, closed=closed)


def test_a_full_pipe_that_does_not_wait_ends_nothing(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        says(tmp_path / "file", writing, writing)
    finally:
        os.close(reading)
        os.close(writing)


def test_what_is_said_on_both_streams_comes_in_its_order():
    words = "import sys; from helpers import console; console.outlast(); print(1); print(2, file=sys.stderr); print(3)"
    command = [sys.executable, "-c", words]
    merged = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    assert merged.stdout == b"1\n2\n3\n"


def test_a_line_that_ctrl_c_falls_into_is_said_once():
    """Python calls the handler of a signal between two instructions: here, right after the bytes were written."""
    interrupted = """
import sys
from helpers import console
console.outlast()
def interrupt(frame, event, what):
    if event == "c_return" and what.__name__ == "write" and frame.f_code.co_filename == console.__file__:
        sys.setprofile(None)
        raise KeyboardInterrupt
sys.setprofile(interrupt)
try:
    print("a line")
except KeyboardInterrupt:
    print("and the end", file=sys.stderr)
"""
    command = [sys.executable, "-c", interrupted]
    made = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert made.stdout == b"a line\nand the end\n"
