"""Runs a training script as it is, and writes down when its steps ended and how much memory it took.

    python benchmarks/watched.py REPORT SCRIPT [ARGUMENT ...]

The report is JSON: `seconds_of_steps` holds the time from the start to the end of each step of an optimizer, and of a
GPU there are `peak_gb`, of the whole run, and `peak_gb_of_training`, after the first step; 1e9 bytes of tensors each.
Of a CPU it is `peak_gb` alone, of the whole process. The script notices nothing, and its exit code is handed on.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from pathlib import Path

START = time.perf_counter()  # before the imports below, of which the script's own start would consist too

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402


class Watch:
    """Counts steps from now on."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._peak_before = 0
        register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, *_: object) -> None:
        self._ends.append(time.perf_counter() - START)
        if len(self._ends) == 1 and torch.cuda.is_available():
            self._peak_before = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def report(self) -> dict[str, object]:
        return {"seconds_of_steps": self._ends, **self._memory()}

    def _memory(self) -> dict[str, float]:
        if not torch.cuda.is_available():
            return {"peak_gb": most_of_the_process() / 1e9}
        since = torch.cuda.max_memory_allocated()
        return {"peak_gb": max(self._peak_before, since) / 1e9, "peak_gb_of_training": since / 1e9}


def most_of_the_process() -> int:
    """The most bytes of memory that this process had at one time."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts in ru_maxrss what the process was before it became this program
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    report, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    watch = Watch()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        Path(report).write_text(json.dumps(watch.report()), "utf-8")


if __name__ == "__main__":
    main()
