"""A sign of life, once a second, by which `helpers/launch.py` sees that a process it started hangs."""

from __future__ import annotations

import os
import signal
import threading

HEARTBEAT_MARK = "FLOYDTUNER_HEARTBEAT"
"""Set by the launcher to the file descriptor to write to."""

SECONDS = 1.0


class Pulse:
    """Beats from a thread, so that only a process that is frozen as a whole stops it.

    Attributes:
        reached: how many times this process came to where it needs the others; one that comes much later than they do
            is stuck, alive as it is.
    """

    def __init__(self) -> None:
        self.reached = 0

    def start(self) -> None:
        """Begin, where there is a launcher. A process whose launcher is gone is asked to stop."""
        mark = os.environ.pop(HEARTBEAT_MARK, None)  # not for the processes that this one starts
        if mark is not None:
            threading.Thread(target=self._beat, args=(int(mark),), name="heartbeat", daemon=True).start()

    def _beat(self, descriptor: int) -> None:
        waiting = threading.Event()
        while True:
            try:
                os.write(descriptor, b"%d\n" % self.reached)
            except OSError:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            waiting.wait(SECONDS)
