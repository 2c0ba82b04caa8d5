"""Start one process for each GPU, watch them, and end all as soon as one is lost.

    python -m helpers.launch 2 train_sd2x.py --model_type=deepfloyd-lora ...

`accelerate launch` and torchrun start processes too, but turn every exit code into 1, and wait for ever for one that
hangs. The processes find each other by torch's own variables: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from helpers import console
from helpers.heartbeat import HEARTBEAT_MARK

LOST = 5
"""Exit code where a process died or hung; also that of the others, who noticed."""

SILENT_SECONDS = 40.0
"""How long a process may give no sign of life, which comes once a second, or stay behind where all the others wait."""

GRACE_SECONDS = 10.0
"""How long the others have to end by themselves when one has ended badly."""

LOOK_SECONDS = 5.0
"""The watcher looks much more often, unless it was frozen, with the machine or by Ctrl-Z: then all counts anew."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TAIL = 4000
"""How many characters of a lost process's last words are shown."""

ENDS = "The run ends. What was saved before is intact, and the same command goes on from there."


def rank_and_count(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which of how many processes this one is, as its launcher says by torch's variables; (0, 1) without a launcher."""
    count = int(environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in environ else 1
    return (int(environ.get("RANK") or 0), count) if count > 1 else (0, 1)


@dataclass
class Rank:
    """One of the processes. `errors` holds what those after the first print; the first one's goes to the terminal.

    Attributes:
        heard: when its last sign of life came.
        reached: how often it came to where it needs the others, and `since` when it is there.
    """

    number: int
    process: subprocess.Popen[bytes]
    pulse: int
    errors: IO[bytes] | None
    heard: float = field(default_factory=time.monotonic)
    reached: int = 0
    since: float = field(default_factory=time.monotonic)

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def code(self) -> int | None:
        """What it ended with; where that was a signal to end, what it ends with when it hears one."""
        code = self.process.poll()
        return 128 - code if self.was_made_to_end else code

    @property
    def was_made_to_end(self) -> bool:
        """Whether a signal to end came for the second time, or before it could hear one."""
        return -(self.process.poll() or 0) in FORWARDED

    def hear(self) -> bool:
        """Take up its signs of life; False when it has closed the pipe, since it ended."""
        beats = os.read(self.pulse, 1 << 16)
        self.heard = time.monotonic()
        numbers = [int(beat) for beat in beats.split()]
        if numbers and numbers[-1] != self.reached:
            self.reached, self.since = numbers[-1], self.heard
        return bool(beats)

    def last_words(self) -> str:
        if self.errors is None:
            return ""
        self.errors.seek(0)
        return self.errors.read().decode("utf-8", "replace")[-TAIL:].strip()


def launch(count: int, command: Sequence[str]) -> int:
    """Run `command` in `count` processes; returns the exit code of all where they agree, or that of the one to blame.

    Signals to this process are passed on to each of them.
    """
    ranks = _start(count, command)
    try:
        with _passing_signals_on(ranks):
            return _watch(ranks)
    finally:
        _end(ranks)


def _start(count: int, command: Sequence[str]) -> list[Rank]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for number in range(count):
        pulse, descriptor = os.pipe()
        own = {"RANK": number, "LOCAL_RANK": number, HEARTBEAT_MARK: descriptor}
        errors = tempfile.TemporaryFile() if number else None
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {name: str(value) for name, value in (shared | own).items()},
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL if number else None,
            stderr=errors,
            start_new_session=True,  # so that Ctrl-C comes once, from here, and not also from the terminal
        )
        os.close(descriptor)
        ranks.append(Rank(number, process, pulse, errors))
    return ranks


@contextmanager
def _passing_signals_on(ranks: Sequence[Rank]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for rank in ranks:
            if rank.runs:
                rank.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in FORWARDED}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # by nohup: the terminal may go, the run is to go on
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[Rank]) -> int:
    """Wait until all have ended, or one is lost."""
    blamed, deadline, looked = None, math.inf, time.monotonic()
    with selectors.DefaultSelector() as pulses:
        for rank in ranks:
            pulses.register(rank.pulse, selectors.EVENT_READ, rank)
        while any(rank.runs for rank in ranks) and time.monotonic() < deadline:
            for key, _ in pulses.select(timeout=0.2):
                if not key.data.hear():
                    pulses.unregister(key.fileobj)
            now = time.monotonic()
            if now - looked > LOOK_SECONDS:
                for rank in ranks:
                    rank.heard = rank.since = now
            looked = now
            blamed = blamed or _blamed(ranks)  # the first, whatever the others then end with
            deadline = min(deadline, now + _patience(blamed, ranks))
            if deadline == math.inf and (hanging := _hanging(ranks)):
                print(f"\n{hanging}, so it hangs. {ENDS}", file=sys.stderr)
                return LOST
    blamed = blamed or _blamed(ranks)
    return _tell(blamed, ranks) if blamed else max(rank.code or 0 for rank in ranks)


def _patience(blamed: Rank | None, ranks: Sequence[Rank]) -> float:
    """For how many seconds the others may go on, now that some have ended."""
    if any(rank.was_made_to_end for rank in ranks):
        return 0.0
    if blamed:
        return GRACE_SECONDS
    # Asked to end, one may have much to put down; or it waits, deaf, for one that has ended.
    return SILENT_SECONDS if any(rank.code for rank in ranks) else math.inf


def _hanging(ranks: Sequence[Rank]) -> str | None:
    """Who gives no sign of life, or does not come to where the others wait, in words."""
    now, furthest = time.monotonic(), max(ranks, key=lambda rank: rank.reached)
    for rank in ranks:
        if rank.runs and now - rank.heard > SILENT_SECONDS:
            return f"{_name(rank, ranks)} gave no sign of life for {SILENT_SECONDS:.0f} s"
        if rank.runs and rank.reached < furthest.reached and now - max(rank.since, furthest.since) > SILENT_SECONDS:
            return f"{_name(rank, ranks)} has not come for {SILENT_SECONDS:.0f} s to where the others wait for it"
    return None


def _blamed(ranks: Sequence[Rank]) -> Rank | None:
    """Who ended badly by itself: not because it was asked to stop, nor because another one was gone."""
    innocent = {None, 0, LOST, *(128 + number for number in FORWARDED)}
    return next((rank for rank in ranks if rank.code not in innocent), None)


def _name(rank: Rank, ranks: Sequence[Rank]) -> str:
    return f"Process {rank.number + 1} of {len(ranks)} (rank {rank.number}, pid {rank.process.pid})"


def _tell(rank: Rank, ranks: Sequence[Rank]) -> int:
    """Tell what one ended with, unless the first did so itself; returns the exit code of all."""
    code = rank.code
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", which is how the system ends a process when memory runs out" if -code == signal.SIGKILL else ""
        print(f"\n{_name(rank, ranks)} was killed by {name}{hint}. {ENDS}", file=sys.stderr)
        return LOST
    if rank.number and ranks[0].code != code:
        print(f"\n{_name(rank, ranks)} ended with exit code {code}. It said:\n{rank.last_words()}", file=sys.stderr)
    return code


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.runs:
            rank.process.kill()  # it may be frozen, or wait for a process that is gone: neither hears a milder signal
        rank.process.wait()
        os.close(rank.pulse)
        if rank.errors:
            rank.errors.close()


if __name__ == "__main__":
    console.outlast()
    sys.exit(launch(int(sys.argv[1]), sys.argv[2:]))
