#!/usr/bin/env python3
"""Train a model by the options of OPTIONS.md.

Exit codes: 0 when training finished; 2 when the options, the data or the weights cannot be used; 3 when loss or
gradient stayed NaN or infinite; 4 when a disk or a quota is full, with what was saved before intact; 6 when `--check
--strict` found anything; 130 when SIGINT (Ctrl-C) ended the run, 143 when SIGTERM or a file `stop` in the output folder
did.
What cannot be foreseen ends with a traceback and exit code 1.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from helpers.config.backends import Backends
from helpers.config.load import Resolved, describe, load_all
from helpers.config.problems import ConfigError
from helpers.files import DiskFull, telling_if_full
from helpers.training.requests import Interrupted, Requests, resume_command

# Read by transformers and diffusers as they are imported: they greet with warnings about packages not needed here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; on a CPU it warns, of its 4-bit products

BAD_INPUT = 2
BROKE_DOWN = 3
NO_ROOM = 4
FINDINGS = 6


def main(arguments: Sequence[str]) -> int:
    """Check the options, then hand over to the trainer; returns the exit code."""
    try:
        resolved, backends = load_all(arguments, os.environ)
    except ConfigError as error:
        return _refuse(error)
    if resolved.config.run.check == "none":  # a check has nothing but its findings on the standard output
        print(describe(resolved, everything=resolved.config.run.dry_run), flush=True)
    requests = Requests()
    try:
        with requests.heard():
            return _train(resolved, backends, requests)
    except Interrupted as error:
        goes_on = resume_command(resolved.config.run.output_dir)
        print(f"\nWhat is cached and saved stays. To go on:\n  {goes_on}", file=sys.stderr)
        return 128 + error.number


def _train(resolved: Resolved, backends: Backends, requests: Requests) -> int:
    # Only now, since these imports take seconds, which a mistyped option need not wait for.
    from helpers import trainer

    try:
        with telling_if_full("what was to be written", resolved.config.run.output_dir):
            if resolved.config.run.check != "none":
                found = trainer.check(resolved, backends)
                return FINDINGS if found and resolved.config.run.strict else 0
            return trainer.train(resolved, backends, requests)
    except DiskFull as error:
        goes_on = resume_command(resolved.config.run.output_dir)
        print(f"\n{error}.\nWhat was saved before is intact. Make room, then go on:\n  {goes_on}", file=sys.stderr)
        return NO_ROOM
    except trainer.REFUSALS as error:
        return _refuse(error)
    except trainer.NonFiniteLoss as error:
        print(f"\n{error}", file=sys.stderr)
        return BROKE_DOWN


def _refuse(error: Exception) -> int:
    print(f"\n{error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    if sys.stdout:  # a path or a prompt may hold what the console's encoding lacks: no reason to end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
