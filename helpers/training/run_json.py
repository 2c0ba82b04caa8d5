"""`run.json` in the output folder: what a run is, and how far its result is."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers.config.jsonfile import BadJson, load_json
from helpers.files import write_whole

RUN_JSON = "run.json"
REPORTED_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")


def write(output: Path, options: Mapping[str, Any], finished: int | None = None) -> None:
    """Write it anew.

    Args:
        options: as `config.load.as_json` gives them.
        finished: the step of the result; where that is not told, the one that was there stays.
    """
    versions = {"python": platform.python_version()} | {name: version(name) for name in REPORTED_PACKAGES}
    step = finished_step(output) if finished is None else finished
    content = {**options, "versions": versions} | ({} if step is None else {"finished": step})
    write_whole(output / RUN_JSON, (json.dumps(content, indent=2) + "\n").encode())


def finished_step(output: Path) -> int | None:
    """The step that the result in an output folder is of; None where there is none, or it is not told."""
    try:
        content = load_json(output / RUN_JSON)
    except (OSError, BadJson):
        return None
    step = content.get("finished") if isinstance(content, dict) else None
    return step if type(step) is int else None
