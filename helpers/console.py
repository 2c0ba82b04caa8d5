"""What a run says, to whoever still listens: a terminal, a pipe or a log."""

from __future__ import annotations

import io
import os
import sys


class _Lasting(io.FileIO):
    """Where what cannot be written is left out, and the run goes on.

    A terminal is closed, `| tee` ends by the same Ctrl-C, a log's disk is full: none of it is a reason to lose a step.
    """

    def write(self, content: bytes) -> int:
        rest = memoryview(content)
        while rest:
            try:
                written = super().write(rest)
            except OSError:
                break
            if written is None:  # a full pipe that does not wait
                break
            rest = rest[written:]
        return len(content)


def outlast() -> None:
    """Let no write to the standard output or error end the run, whatever it says and whoever has gone.

    Where one of the three standard streams is closed it is opened on nothing: or the next file that is opened would
    get its number, and what is said.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before:
            before.flush()
        raw = _Lasting(number, "w", closefd=False)
        # Whole lines, into a pipe or a log too: so they are read at once, and both streams in their order. With no
        # buffer of bytes below, which would say a line again where Ctrl-C falls into its writing.
        stream = io.TextIOWrapper(raw, before.encoding if before else "utf-8", "backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
