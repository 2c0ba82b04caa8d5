"""How libraries are imported: without greetings, and without what they would import for nothing here."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType

BITSANDBYTES = "bitsandbytes"


def prepare() -> None:
    """Settle it for this process, before numpy, torch, diffusers, transformers or peft are imported."""
    # Read as they are imported: they greet with warnings about packages that are not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Images are decoded by as many threads as there are cores: numpy's products of matrices need none beside them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # peft imports bitsandbytes for layers of 8 and 4 bits. That takes a second and a half, and would fetch and run
    # kernels from the hub wherever the package of that name is installed.
    sys.modules.setdefault(BITSANDBYTES, None)
    sys.modules.setdefault("kernels", None)


@contextmanager
def importing() -> Iterator[None]:
    """Within it no circles of garbage are looked for: imports make 700,000 objects that stay, and to look through those
    again and again is a quarter of the time that they take. Nor are these looked through later.
    """
    is_first = "diffusers" not in sys.modules  # later there may be garbage by now, which would stay
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        gc.enable()


def is_installed(package: str) -> bool:
    """Whether a package can be imported, or could be but for `prepare`."""
    return PathFinder.find_spec(package) is not None


def bitsandbytes() -> ModuleType:
    """That package with its optimizers."""
    if sys.modules.get(BITSANDBYTES, BITSANDBYTES) is None:
        del sys.modules[BITSANDBYTES]
    return importlib.import_module(f"{BITSANDBYTES}.optim")
