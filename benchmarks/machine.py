"""What a benchmark's figures were measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")


def describe_machine() -> dict[str, object]:
    """Device, processor, versions and commit, for a result's JSON."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() if commit.returncode == 0 else "unknown",
    }


def write_result(path: Path, figures: Mapping[str, object]) -> dict[str, object]:
    """Print the figures with the machine, and keep them as JSON; returns what was written."""
    result = keep_result(path, figures)
    print(json.dumps(result, indent=2))
    return result


def keep_result(path: Path, figures: Mapping[str, object]) -> dict[str, object]:
    """Keep the figures with the machine as JSON; returns what was written."""
    result = {**figures, "machine": describe_machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
