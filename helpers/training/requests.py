"""What is asked of a run from outside while it goes, and how it goes on afterwards. Without torch, to be heard early.

The first SIGINT, SIGTERM or SIGHUP, or a file `stop` in the output folder, ends the run in good order: after the step
in progress, saved. The second SIGINT or SIGTERM ends it at once. SIGUSR1 asks for a checkpoint after the step.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STOP_FILE = "stop"

COMMAND_MARK = "FLOYDTUNER_COMMAND"
"""Set by train.sh to the command that its user typed."""

LAUNCHER_MARK = "ACCELERATE_MIXED_PRECISION"
"""Set by `accelerate launch`, which hands no signal on to the process that it starts."""

_ENDING = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 0.3
"""So long the same wish may come again, from what stands between: `timeout` sends its signal twice, launchers hand
on the Ctrl-C that the terminal sent already. A person who reads what is said takes longer."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop before there was anything to save; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Requests:
    """What was asked of a run.

    Args:
        speaks: whether to say that it was heard, as one of several processes does.

    Attributes:
        stop: the signal that asked to end it; SIGTERM where that was a file or the launcher's end. None: go on.
        save: whether a checkpoint was asked for, besides those that are due.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.stop: int | None = None
        self.save = False
        self._speaks = speaks
        self._deferring = False
        self._parent = os.getppid()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within it signals are answered. One that asks to stop raises Interrupted, unless `deferred`."""
        answers = {number: self._on_stop for number in (*_ENDING, signal.SIGHUP)} | {signal.SIGUSR1: self._on_save}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup: the terminal may go, the run is to go on
            del answers[signal.SIGHUP]
        before = {number: signal.signal(number, answer) for number, answer in answers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a signal is noted, for the loop to look at after its step: nothing in progress is broken off."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def look(self, output: Path) -> None:
        """Ask to stop where there is a file `stop` in the output folder, which is removed, or the launcher is gone."""
        if self.stop is not None:
            return
        if (output / STOP_FILE).is_file():
            self._ask_to_stop(signal.SIGTERM)
            try:
                (output / STOP_FILE).unlink(missing_ok=True)
            except OSError as error:
                self._say(f"{output / STOP_FILE} cannot be removed ({error.strerror}): do that before going on.")
        elif LAUNCHER_MARK in os.environ and os.getppid() != self._parent:
            self._ask_to_stop(signal.SIGTERM)

    def _on_stop(self, number: int, frame: object) -> None:
        if self.stop is not None:  # an echo; or the terminal is closed while the run saves
            return
        self._ask_to_stop(number)
        if not self._deferring:
            raise Interrupted(number)

    def _on_save(self, number: int, frame: object) -> None:
        self.save = True
        which = "this" if self._deferring else "the first"
        self._say(f"SIGUSR1: a checkpoint will be saved after {which} step.")

    def _ask_to_stop(self, number: int) -> None:
        self.stop = number
        time.sleep(_ECHO_SECONDS)
        for each in _ENDING:
            signal.signal(each, signal.SIG_DFL)
        first = "saving after this step" if self._deferring else "ending, with what is cached so far"
        self._say(f"Interrupted: {first}. Once more ends it at once, unsaved.")

    def _say(self, words: str) -> None:
        """To stderr past Python's buffers: a handler may come in a print, which may not be entered twice."""
        if self._speaks:
            with suppress(OSError):  # a terminal that was closed is no reason to end unsaved
                os.write(2, f"\n{words}\n".encode())


def resume_command(output: Path) -> str:
    """What was typed, with the output folder as it is now: an env file may compute it anew each time."""
    typed = os.environ.get(COMMAND_MARK) or f"{shlex.quote(sys.executable)} {shlex.join(sys.argv)}"
    to_go_on = f" --output_dir={shlex.quote(str(output))} --resume_from_checkpoint=latest"
    return typed.removesuffix(to_go_on) + to_go_on  # it ends so already where the run was resumed before
