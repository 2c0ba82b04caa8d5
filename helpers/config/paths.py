"""Where relative paths start."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's root: the folder that train.sh and train_sd2x.py lie in."""


def from_root(path: str | Path) -> Path:
    """`path` as an absolute path: `~` is expanded, a relative path counts from the project's root."""
    return ROOT / Path(path).expanduser()
