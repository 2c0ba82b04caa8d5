"""What the trainer imports as it starts, and what it leaves until it is needed."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.libraries import bitsandbytes, importing, is_installed

ROOT = Path(__file__).parent.parent
STARTING = """
import sys
sys.path.insert(0, "")
import train_sd2x, helpers.trainer, peft, peft.tuners.lora
assert "torch" in sys.modules and "diffusers" in sys.modules
print(*sorted({name.partition(".")[0] for name, module in sys.modules.items() if module}))
"""


def test_a_start_does_not_import_what_only_some_runs_need():
    made = subprocess.run([sys.executable, "-c", STARTING], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert not {"bitsandbytes", "kernels", "tensorboard", "wandb", "torchao"} & set(made.stdout.split())


def test_no_garbage_is_looked_for_during_the_first_imports_and_what_they_make_is_not_looked_through_later(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", sys)  # as if it were there
    for is_first in (False, True):
        if is_first:
            monkeypatch.delitem(sys.modules, "diffusers")
        frozen = gc.get_freeze_count()
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
            raise ImportError
        assert gc.isenabled()
        assert (gc.get_freeze_count() >= frozen + len(made)) == is_first


def test_a_hidden_package_is_installed_all_the_same_and_imported_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert is_installed("bitsandbytes") and not is_installed("no_such_package")
    with pytest.raises(ImportError):
        import bitsandbytes as _  # noqa: F401
    assert bitsandbytes().AdamW8bit
