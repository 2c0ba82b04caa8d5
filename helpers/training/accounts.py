"""Accounts that a run needs, asked for before its work begins, and never at the console: nobody may be there."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

from helpers.config.options import LONGEST_HUB_NAME, ROWS, RunOptions
from helpers.config.problems import ConfigError, one_of
from helpers.files import on_one_line

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


HUB_LOGIN = "run `hf auth login` here once, with a token that may write, or `export HF_TOKEN=...`"
LONGEST_REASON = 300
PATIENCE = 100.0
"""Seconds that the hub may be silent: it gives up itself after 60."""


def hub_api() -> HfApi:
    """The hub, as one asks it here: left to itself, huggingface_hub waits for ever for one that does not answer."""
    get_session().timeout = PATIENCE
    return HfApi()


def require_repository(run: RunOptions) -> str | None:
    """The repository that a run is to upload to, as owner/name; None where it is to upload nothing.

    Raises:
        ConfigError: no account is known, it may not write there, or the hub does not answer: training would be over
            when that shows.
    """
    if not run.push_to_hub:
        return None
    label = ROWS["push_to_hub"].label
    try:
        account = hub_api().whoami()
        repository = _repository(run, account)
        public = run.hub_private and is_public(repository)
    except ConfigError:
        raise
    except Exception as error:  # whichever library it is of: all that is done here is to ask
        words = f"found true, but {refusal(error)}: {HUB_LOGIN}, or set it to false"
        raise ConfigError([f"{label}: {words}"]) from error
    if public:
        words = f"found {repository}, which is public: name another, or set HUB_PRIVATE (--hub_private) to false"
        raise ConfigError([f"{ROWS['hub_model_id'].label}: {words}"])
    return repository


def _repository(run: RunOptions, account: dict[str, Any]) -> str:
    user = str(account.get("name"))
    role = (account.get("auth") or {}).get("accessToken") or {}
    if role.get("role") == "read":
        words = f"found true, but the token of {user} may only read: {HUB_LOGIN}, or set it to false"
        raise ConfigError([f"{ROWS['push_to_hub'].label}: {words}"])
    name = run.hub_model_id or hub_name(run.tracker_run_name or run.output_dir.name)
    owner = name.partition("/")[0] if "/" in name else user
    owners = [user, *(str(one.get("name")) for one in account.get("orgs") or [])]
    if owner not in owners:
        words = f"found {name!r}, but the account here is {user}'s: the owner may be {one_of(owners)}"
        raise ConfigError([f"{ROWS['hub_model_id'].label}: {words}"])
    return name if "/" in name else f"{owner}/{name}"


def hub_name(text: str) -> str:
    """A repository's name that stands for any text."""
    name = re.sub(r"[-.]{2,}", "-", re.sub(r"[^A-Za-z0-9_.-]+", "-", text))[: LONGEST_HUB_NAME // 2]
    return name.strip("-.").removesuffix(".git").strip("-.") or "floydtuner"


def is_public(repository: str) -> bool:
    """Whether a repository is there, for everybody to see."""
    try:
        return hub_api().repo_info(repository).private is False
    except RepositoryNotFoundError:
        return False


def refusal(error: Exception) -> str:
    """Why the hub was of no use, in words that stand on one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return "no account of the Hugging Face hub is known here"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps it from being asked"
    if status == 401:
        return "the Hugging Face hub does not know the token that is set here"
    # Such as that the account has no room left, which is a 403 as well.
    said = getattr(error, "server_message", None) if status else next(iter(str(error).splitlines()), "")
    why = f": {said[:LONGEST_REASON]}" if said else ""
    if status == 403:
        return on_one_line(f"the account may not write there (error 403{why})")
    if status is not None:
        return on_one_line(f"the Hugging Face hub answers with error {status}{why}")
    return on_one_line(f"the Hugging Face hub cannot be used ({type(error).__name__}{why})")
