#!/usr/bin/env python3
"""Train a model by the options of OPTIONS.md.

Exit codes: 0 when training finished; 2 when the options, the data or the weights cannot be used; 3 when the loss became
NaN or infinite; 128 + the signal when it was interrupted. What cannot be foreseen ends with a traceback and exit code 1.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from helpers.config.load import describe, load_all
from helpers.config.problems import ConfigError

# Read by transformers and diffusers as they are imported: they greet with warnings about packages not needed here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; on a CPU it warns, of its 4-bit products

BAD_INPUT = 2
BROKE_DOWN = 3


def main(arguments: Sequence[str]) -> int:
    """Check the options, then hand over to the trainer; returns the exit code."""
    try:
        resolved, backends = load_all(arguments, os.environ)
    except ConfigError as error:
        return _refuse(error)
    print(describe(resolved, everything=resolved.config.run.dry_run), flush=True)
    # Only now, since these imports take seconds, which a mistyped option need not wait for.
    from helpers import trainer

    try:
        return trainer.train(resolved, backends)
    except trainer.REFUSALS as error:
        return _refuse(error)
    except trainer.NonFiniteLoss as error:
        print(f"\n{error}", file=sys.stderr)
        return BROKE_DOWN
    except KeyboardInterrupt:
        print("\nInterrupted. What is cached and saved stays; the same command goes on.", file=sys.stderr)
        return 128 + signal.SIGINT


def _refuse(error: Exception) -> int:
    print(f"\n{error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
