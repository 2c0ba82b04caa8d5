"""Accounts that a run needs, asked for before its work begins, and never at the console: nobody may be there."""

from __future__ import annotations

import os
import sys

from helpers.config.options import ROWS
from helpers.config.problems import ConfigError

LOGIN = "run `wandb login` here once, or `export WANDB_MODE=offline`, or type tensorboard or none"


def require_account(report_to: str) -> None:
    """See that Weights & Biases can be used: left to itself, it asks for an account after hours of caching, and waits.

    Raises:
        ConfigError: it knows no account, or cannot reach its own.
    """
    if report_to != "wandb":
        return
    import wandb  # it is no requirement

    if wandb.setup().settings.mode not in ("online", "shared", "run", None):
        return
    stdin = sys.stdin
    try:
        with open(os.devnull, encoding="utf-8") as sys.stdin:  # no console: then it refuses instead of asking
            known, reason = wandb.login(), "there is no account"
    except wandb.Error as error:
        known, reason = False, str(error)
    finally:
        sys.stdin = stdin
    if not known:
        raise ConfigError([f"{ROWS['report_to'].label}: found 'wandb', which cannot log in ({reason}): {LOGIN}"])
