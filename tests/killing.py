"""Trains again and again in processes of its own that it kills, as a machine that is taken away does.

    python -m tests.killing '{"flags": [...], "output": ".../output", "folder": ".../chains", "kills": 30, "seed": 1}'

`folder/whole` is a run that nobody killed; each `killed-N` there is of one that was killed, and started again with the
same flags, until it came to its end. Prints how many kills met which part of a run. Torch is imported once: each run is
a fork of this process, which itself computes nothing, as threads do not live through a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402

import train_sd2x  # noqa: E402
from helpers import trainer  # noqa: E402
from helpers.data import preparation  # noqa: E402
from helpers.training import checkpoints, loop  # noqa: E402
from helpers.validation.render import Validation  # noqa: E402

PARTS = ("caching pixels", "caching texts", "step", "validation", "save", "export")
OFTEN = ("step", "validation", "save")
AT_ANY_TIME = "at any time"
KILLS_IN_A_ROW = 12
"""After so many a run may come to its end, if it has not before."""


class Board:
    """What a run shows of itself to the process that watches it: how often each part began, and how long it took."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16 * len(PARTS))  # shared with the forks

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def begun(self, part: str) -> int:
        return self._read(part)[0]

    def seconds(self, part: str) -> float:
        begun, seconds = self._read(part)
        return seconds / max(1, begun)

    def shown(self, part: str, function: Callable) -> Callable:
        """The function, with its calls shown as this part."""

        def call(*arguments: object, **named: object) -> object:
            begun, seconds = self._read(part)
            self._write(part, begun + 1, seconds)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._write(part, begun + 1, seconds + time.perf_counter() - start)

        return call

    def _read(self, part: str) -> tuple[int, float]:
        return struct.unpack_from("qd", self._memory, 16 * PARTS.index(part))

    def _write(self, part: str, begun: int, seconds: float) -> None:
        struct.pack_into("qd", self._memory, 16 * PARTS.index(part), begun, seconds)


def show_parts(board: Board) -> None:
    preparation.cache_pixels = board.shown("caching pixels", preparation.cache_pixels)
    preparation.cache_texts = board.shown("caching texts", preparation.cache_texts)
    loop.training_loss = board.shown("step", loop.training_loss)
    Validation.__call__ = board.shown("validation", Validation.__call__)
    checkpoints.save = board.shown("save", checkpoints.save)
    trainer._finish = board.shown("export", trainer._finish)


def start(flags: list[str], log: Path, modules: Path | None = None) -> int:
    """A run in a fork of this process; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = train_sd2x.main(flags)
            if modules:
                modules.write_text(json.dumps(sorted(sys.modules)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid: int, log: Path) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"a run ended with status {status}:\n{log.read_text()[-6000:]}")


def is_over(pid: int, log: Path) -> bool:
    found, status = os.waitpid(pid, os.WNOHANG)
    if found and status:
        raise SystemExit(f"a run that was killed before ended with status {status}:\n{log.read_text()[-6000:]}")
    return bool(found)


def main(flags: list[str], output: str, folder: str, kills: int, seed: int) -> Counter[str]:
    torch.set_num_threads(1)
    board, rng, root = Board(), random.Random(seed), Path(folder)
    show_parts(board)

    def prepared(name: str) -> tuple[list[str], Path]:
        own = root / name
        own.mkdir(parents=True)
        return [*flags, f"--output_dir={own / output}", f"--cache_dir={own / 'cache'}"], own / "log"

    whole, log = prepared("whole")
    finish(start(whole, log, root / "modules.json"), log)
    for module in json.loads((root / "modules.json").read_text()):
        with contextlib.suppress(Exception):  # what the libraries import late, so that no fork has to do it again
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # no fork need look through all that was imported
    assert threading.active_count() == 1
    board.clear()
    began = time.perf_counter()
    timed, log = prepared("timed")
    finish(start(timed, log), log)
    length = time.perf_counter() - began
    durations = {part: board.seconds(part) for part in PARTS}
    done: Counter[str] = Counter()
    for chain in range(10**6):
        if done.total() == kills:
            return done
        again, log = prepared(f"killed-{chain}")
        for number in range(KILLS_IN_A_ROW + 1):
            board.clear()
            pid = start(again, log)
            if number == KILLS_IN_A_ROW or done.total() == kills:
                finish(pid, log)
                break
            part = rng.choice((*PARTS, AT_ANY_TIME))
            if part == AT_ANY_TIME:
                deadline = time.perf_counter() + rng.uniform(0, length)
            else:
                deadline, times = None, rng.randint(1, 2 if part in OFTEN else 1)
            over = False
            while not (over := is_over(pid, log)):
                if deadline is None and board.begun("export"):  # it had less left to do than was expected
                    part, times = "export", 1
                if deadline is None and board.begun(part) >= times:
                    deadline = time.perf_counter() + rng.uniform(0, durations[part])
                if deadline is not None and time.perf_counter() >= deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    done[part] += 1
                    break
                time.sleep(0.0005)
            if over:
                break


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
