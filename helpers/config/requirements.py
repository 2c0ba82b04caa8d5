"""Does this Python have what requirements.txt asks for, with all that it needs in turn? For train.sh and tests/run.sh.

`python helpers/config/requirements.py requirements.txt` prints what is lacking and ends with code 1 if anything is.
It needs nothing but the standard library and `packaging`, and an old Python must be able to read it.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

OLDEST_PYTHON = (3, 11)


def lacking(lines: list[str]) -> list[str]:
    """What is missing or of a wrong version among `lines` (requirements) and everything that they require."""
    from packaging.requirements import Requirement

    waiting = [Requirement(line) for line in lines]
    seen, problems = set(), []
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower().replace("_", "-"), str(requirement.specifier), tuple(requirement.extras))
        if key in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            problems.append(f"{requirement.name} is {found.version}, not {requirement.specifier}")
        waiting += _needed(found, requirement.extras)
    return problems


def _needed(distribution, extras):
    """The requirements of an installed distribution, with those of `extras`."""
    from packaging.requirements import Requirement

    for line in distribution.requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            requirement.marker = None
            yield requirement


def main(arguments: list[str]) -> int:
    """Print what this Python lacks; 0 if nothing, 1 otherwise."""
    if sys.version_info < OLDEST_PYTHON:
        print("Python {}.{} is too old".format(*sys.version_info[:2]))
        return 1
    lines = [line.split("#")[0].strip() for line in Path(arguments[0]).read_text(encoding="utf-8").splitlines()]
    try:
        problems = lacking([line for line in lines if line])
    except ModuleNotFoundError:
        problems = ["packaging is not installed"]
    print("\n".join(sorted(problems)), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
