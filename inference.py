#!/usr/bin/env python3
"""Draw pictures: DeepFloyd IF's cascade I -> II -> III from one command, with adapters; `./inference.py --demo`.

Exit codes: 0 when all pictures were written; 2 when the options, the weights, an adapter or a recipe cannot be used;
4 when a disk or a quota is full, with the pictures before intact; 130 when Ctrl-C ended it.
What cannot be foreseen ends with a traceback and exit code 1.
"""

from __future__ import annotations

import contextlib
import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
ENVIRONMENT = "FLOYDTUNER_ENVIRONMENT"
"""Set where `in_environment` has chosen the Python, so that it is asked once."""

CHOOSING = """
root=$1 && shift
cd "$root" && . helpers/environment.sh && %s && PYTHON=$(command -v "$PYTHON") || exit 2
case $PYTHON in /*) ;; *) PYTHON=$root/$PYTHON ;; esac
cd "$OLDPWD" && exec "$PYTHON" "$root/inference.py" "$@"
"""
"""Choose a Python as train.sh does, from the project's root, and go on with it where the user is."""

BAD_INPUT = 2
NO_ROOM = 4
INTERRUPTED = 130


def in_environment(arguments: list[str]) -> None:
    """Go on in a Python that has what requirements.txt asks for, as train.sh does, if this one has it not.

    An old Python must be able to read this.
    """
    if os.environ.get(ENVIRONMENT) == ROOT:
        return
    sys.path.insert(0, ROOT)
    from helpers.config.requirements import main as look

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        is_complete = look([os.path.join(ROOT, "requirements.txt")]) == 0
    if is_complete:
        return
    os.environ[ENVIRONMENT] = ROOT
    # Help makes no environment, as that of train.sh does not.
    find = "find_python" if {"--help", "-h"} & set(arguments) else "need_python"
    os.execvp("bash", ["bash", "-c", CHOOSING % find, "bash", ROOT] + arguments)


def main(arguments: list[str]) -> int:
    """Check the options, then draw; returns the exit code."""
    from helpers import libraries
    from helpers.config.inference import read_request
    from helpers.config.paths import shown
    from helpers.config.problems import ConfigError
    from helpers.files import DiskFull, telling_if_full

    refusals = (ConfigError,)
    try:
        request = read_request(arguments)
        with libraries.importing():  # only now, since this takes seconds, which a mistyped option need not wait for
            from helpers.inference import command, recipe
            from helpers.planning import quieten_libraries

        quieten_libraries()
        refusals = command.REFUSALS
        with telling_if_full("a picture", request.options.output):
            content = recipe.read(request.options.replay) if request.options.replay else None
            if content is None or content.get("kind") != "validation":
                return command.run(request, arguments, content)
            from helpers import replay
            from helpers.images.recipes import compared

            refusals = replay.REFUSALS
            path = replay.draw_again(request.options.replay, content, command.output_of_replay(request))
            print(shown(path), compared(path, request.options.replay), sep="\n")
            return 0
    except refusals as error:
        print("\n%s" % error, file=sys.stderr)
        return BAD_INPUT
    except DiskFull as error:
        print("\n%s.\nThe pictures that were written before are intact." % error, file=sys.stderr)
        return NO_ROOM
    except KeyboardInterrupt:
        print("\nInterrupted: the pictures that were written stay.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    in_environment(sys.argv[1:])
    from helpers import console, libraries

    libraries.prepare()
    console.outlast()
    sys.exit(main(sys.argv[1:]))
