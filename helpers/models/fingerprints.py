"""What tells whether the files of a model are those of before, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES = 1024
SAMPLE_BYTES = 4096


def fingerprint_unet(model: Path, variant: str | None) -> str:
    """A fingerprint of the UNet that is loaded from a pipeline's folder."""
    return fingerprint_model(model / "unet", variant)


def fingerprint_model(folder: Path, variant: str | None) -> str:
    """A fingerprint of one of diffusers' models: of those files that are read for this variant."""
    weights = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    return fingerprint_files(folder, ("config.json", f"{weights}.safetensors", f"{weights}-*.safetensors"))


def fingerprint_files(folder: Path, patterns: tuple[str, ...] = ("*",)) -> str:
    """A hash of every file below `folder` whose name fits: names, sizes, and evenly spaced samples of the bytes.

    Sampled, since T5-XXL has 19 GB in two files; but so that none of its matrices, of 33 MB and more, is passed over:
    whatever tunes one moves nearly all of its bytes.
    """
    digest = hashlib.sha256()
    fitting = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    for path in sorted(fitting):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        _add(digest, path)
    return digest.hexdigest()


def fingerprint_file(path: Path) -> str:
    """A hash of one file in the same way, whatever its name is."""
    digest = hashlib.sha256()
    _add(digest, path)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, path: Path) -> None:
    """Add a file's size, and the samples of its bytes, to a hash."""
    size = path.stat().st_size
    digest.update(f"{size}\0".encode())
    with path.open("rb") as file:
        for start in sorted({size * i // SAMPLES for i in range(SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
