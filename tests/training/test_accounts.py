"""A run that needs an account says so before its work begins, and asks nobody."""

from __future__ import annotations

import io
import sys

import pytest

from helpers.config.problems import ConfigError
from helpers.training.accounts import require_account

# What `require_account` uses of the real package, which is no requirement; `login` asks as that does.
WANDB = """
import os, sys
from types import SimpleNamespace
class Error(Exception): ...
def setup(): return SimpleNamespace(settings=SimpleNamespace(mode=os.environ.get("WANDB_MODE", "online")))
def login():
    if "WANDB_API_KEY" in os.environ:
        return True
    if sys.stdin.isatty():
        sys.exit("asked at the console")
    raise Error("no API key")
"""


class Console(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def console(tmp_path, monkeypatch) -> Console:
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdin", Console())
    yield sys.stdin
    sys.modules.pop("wandb", None)


def test_weights_and_biases_without_an_account_is_refused_and_asks_nothing(console):
    with pytest.raises(ConfigError, match="REPORT_TO.*no API key.*wandb login.*WANDB_MODE=offline"):
        require_account("wandb")
    assert sys.stdin is console


def test_with_an_account_or_offline_it_may_be_used(console, monkeypatch):
    with monkeypatch.context() as offline:
        offline.setenv("WANDB_MODE", "offline")
        require_account("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    require_account("wandb")
    assert sys.stdin is console


@pytest.mark.parametrize("report_to", ["tensorboard", "none"])
def test_others_need_none(console, report_to):
    require_account(report_to)
    assert "wandb" not in sys.modules
