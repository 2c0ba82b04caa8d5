"""Trains again and again in processes of its own that it kills, as a machine that is taken away does.

    python -m tests.killing '{"kinds": {"plain": {"flags": [...], "kills": 40, "seed": 1}}, "folder": ".../runs"}'

`folder/<kind>/whole` is a run that nobody killed; each `killed-N` there is of one that was killed, and started again
with the same flags, until it came to its end. `folder/<kind>/kills.json` says how many kills met which part of a run.
Torch is imported once: each kind is a fork of this process, and each run a fork of that one. Both compute nothing
themselves, as threads do not live through a fork.
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

import torch

import train_sd2x
from helpers import trainer
from helpers.data import preparation
from helpers.training import checkpoints, loop
from helpers.validation.render import Validation

PARTS = ("caching images", "caching texts", "step", "validation", "save", "export")
OFTEN = ("step", "validation", "save")
AT_ANY_TIME, BETWEEN = "at any time", "between these"
KILLS_IN_A_ROW = 12
"""After so many a run may come to its end, if it has not before."""


class Board:
    """What a run shows of itself to the process that watches it.

    Of each part how often it began and how long that took, and which part it is in.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16 * len(PARTS) + 8)  # shared with the forks

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def begun(self, part: str) -> int:
        return self._read(part)[0]

    def seconds(self, part: str) -> float:
        begun, seconds = self._read(part)
        return seconds / max(1, begun)

    @property
    def inside(self) -> str:
        number = struct.unpack_from("q", self._memory, 16 * len(PARTS))[0]
        return PARTS[number - 1] if number else BETWEEN

    def shown(self, part: str, function: Callable) -> Callable:
        """The function, with its calls shown as this part."""

        def call(*arguments: object, **named: object) -> object:
            begun, seconds = self._read(part)
            self._write(part, begun + 1, seconds)
            self._enter(PARTS.index(part) + 1)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._enter(0)
                self._write(part, begun + 1, seconds + time.perf_counter() - start)

        return call

    def _enter(self, number: int) -> None:
        struct.pack_into("q", self._memory, 16 * len(PARTS), number)

    def _read(self, part: str) -> tuple[int, float]:
        return struct.unpack_from("qd", self._memory, 16 * PARTS.index(part))

    def _write(self, part: str, begun: int, seconds: float) -> None:
        struct.pack_into("qd", self._memory, 16 * PARTS.index(part), begun, seconds)


def show_parts(board: Board) -> None:
    for name in ("cache_pixels", "cache_latents"):
        setattr(preparation, name, board.shown("caching images", getattr(preparation, name)))
    preparation.cache_texts = board.shown("caching texts", preparation.cache_texts)
    loop.training_loss = board.shown("step", loop.training_loss)
    Validation.__call__ = board.shown("validation", Validation.__call__)
    checkpoints.save = board.shown("save", checkpoints.save)
    trainer.finish = board.shown("export", trainer.finish)


def start(flags: list[str], log: Path, modules: Path | None = None) -> int:
    """A run in a fork of this process; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # this makes torch's pool of threads anew, which two threads at once would fail at
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


def prepared(folder: Path, flags: list[str]) -> tuple[list[str], Path]:
    """The flags and the log of a run with a folder of its own."""
    folder.mkdir(parents=True)
    return [*flags, f"--output_dir={folder / 'output'}", f"--cache_dir={folder / 'cache'}"], folder / "log"


def kill_and_start_again(flags: list[str], kills: int, seed: int, root: Path) -> Counter[str]:
    """Returns how many kills met which part."""
    board, rng = Board(), random.Random(seed)
    show_parts(board)
    whole, log = prepared(root / "whole", flags)
    began = time.perf_counter()
    finish(start(whole, log), log)
    length = time.perf_counter() - began
    durations = {part: board.seconds(part) for part in PARTS}
    done: Counter[str] = Counter()
    for chain in range(10**6):
        if done.total() == kills:
            return done
        again, log = prepared(root / f"killed-{chain}", flags)
        for number in range(KILLS_IN_A_ROW + 1):
            board.clear()
            pid = start(again, log)
            if number == KILLS_IN_A_ROW or done.total() == kills:
                finish(pid, log)
                break
            # At first while it caches, of which it has less to do each time.
            part = PARTS[number] if number < 2 else rng.choice((*PARTS, AT_ANY_TIME))
            if part == AT_ANY_TIME:
                deadline, times = time.perf_counter() + rng.uniform(0, length), 0
            else:
                deadline, times = None, rng.randint(1, 2 if part in OFTEN else 1)
            while not (over := is_over(pid, log)):
                if deadline is None and board.begun("export"):  # it had less left to do than was expected
                    part, times = "export", 1
                if deadline is None and board.begun(part) >= times:
                    deadline = time.perf_counter() + rng.uniform(0, durations[part])
                if deadline is not None and time.perf_counter() >= deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    done[board.inside] += 1
                    break
                time.sleep(0.0005)
            if over:
                break


def main(kinds: dict[str, dict], folder: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    first, log = prepared(root / "first", next(iter(kinds.values()))["flags"])
    finish(start(first, log, root / "modules.json"), log)
    for module in json.loads((root / "modules.json").read_text()):
        with contextlib.suppress(Exception):  # what the libraries import late, so that no fork has to do it again
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # no fork need look through all that was imported
    assert threading.active_count() == 1
    forks = []
    for kind, options in kinds.items():
        forks.append(os.fork())
        if forks[-1] == 0:
            code = 1
            try:
                kills = kill_and_start_again(**options, root=root / kind)
                (root / kind / "kills.json").write_text(json.dumps(kills))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
    if any([os.waitpid(pid, 0)[1] for pid in forks]):
        sys.exit(1)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
