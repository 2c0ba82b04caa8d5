#!/usr/bin/env python3
"""Train a model by the options of OPTIONS.md.

Exit codes: 0 when training finished; 2 when the options, the data or the weights cannot be used; 3 when loss or
gradient stayed NaN or infinite; 4 when a disk or a quota is full, with what was saved before intact; 5 when one of
several processes died or hung; 6 when `--check --strict` found anything; 129 when SIGHUP (a terminal that was closed)
ended the run, 130 when SIGINT (Ctrl-C) did, 143 when SIGTERM or a file `stop` in the output folder did.
What cannot be foreseen ends with a traceback and exit code 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from helpers import console, libraries
from helpers.config.backends import Backends
from helpers.config.load import Resolved, describe, load_all
from helpers.config.problems import ConfigError
from helpers.files import DiskFull, telling_if_full
from helpers.heartbeat import Pulse
from helpers.launch import LOST, rank_and_count
from helpers.training.requests import Interrupted, Requests, resume_command

libraries.prepare()

BAD_INPUT = 2
BROKE_DOWN = 3
NO_ROOM = 4
FINDINGS = 6


def main(arguments: Sequence[str]) -> int:
    """Check the options, then hand over to the trainer; returns the exit code."""
    pulse = Pulse()
    pulse.start()  # already here: what is imported later takes long from a slow disk
    is_first = rank_and_count()[0] == 0
    if not is_first:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
        os.environ["TQDM_DISABLE"] = "1"
    try:
        resolved, backends = load_all(arguments, os.environ)
    except ConfigError as error:
        return _refuse(error)
    if resolved.config.run.check == "none":  # a check has nothing but its findings on the standard output
        print(describe(resolved, everything=resolved.config.run.dry_run), flush=True)
    requests = Requests(speaks=is_first)
    try:
        with requests.heard():
            return _run(resolved, backends, requests, pulse)
    except Interrupted as error:
        if is_first:
            goes_on = resume_command(resolved.config.run.output_dir)
            print(f"\nWhat is cached and saved stays. To go on:\n  {goes_on}", file=sys.stderr)
        return 128 + error.number


def _run(resolved: Resolved, backends: Backends, requests: Requests, pulse: Pulse) -> int:
    with libraries.importing():  # only now, since this takes seconds, which a mistyped option need not wait for
        from helpers import trainer
        from helpers.check import check
        from helpers.processes import PeerLost, TooFewGPUs, connected
        from helpers.training.loop import NonFiniteLoss

    try:
        with telling_if_full("what was to be written", resolved.config.run.output_dir), connected(pulse) as processes:
            if resolved.config.run.check == "none":
                return trainer.train(resolved, backends, requests, processes)
            found = check(resolved, backends, processes) if processes.is_first else 0
            return FINDINGS if found and resolved.config.run.strict else 0
    except PeerLost as error:
        print(f"\nAnother process of this run ended ({error}).", file=sys.stderr)
        return LOST
    except DiskFull as error:
        goes_on = resume_command(resolved.config.run.output_dir)
        print(f"\n{error}.\nWhat was saved before is intact. Make room, then go on:\n  {goes_on}", file=sys.stderr)
        return NO_ROOM
    except (*trainer.REFUSALS, TooFewGPUs) as error:
        return _refuse(error)
    except NonFiniteLoss as error:
        print(f"\n{error}", file=sys.stderr)
        return BROKE_DOWN


def _refuse(error: Exception) -> int:
    print(f"\n{error}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    console.outlast()
    sys.exit(main(sys.argv[1:]))
