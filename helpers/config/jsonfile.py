"""Reading the users' JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers.config.problems import ConfigError

COMMENT_LINE = re.compile(r"^[ \t]*(#|//).*$", re.MULTILINE)
"""A whole line of comment. No JSON string goes over several lines, so none can be hit."""


def read_json(path: Path, option: str) -> object:
    """Read strict JSON, but for whole lines of `#` or `//` comment, which are skipped.

    `option` names the option that led to the file, for the message.

    Raises:
        ConfigError: if the file cannot be read, is not JSON, or says a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{option}: there is no file {path}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{option}: {path} cannot be read: {error}"]) from None
    try:
        return json.loads(COMMENT_LINE.sub("", text), object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}, line {error.lineno}, column {error.colno}: {_remedy(error)}"]) from None
    except _Twin as twin:
        raise ConfigError([f"{path}: key {twin} is there twice in one object: remove one"]) from None


class _Twin(ValueError):
    pass


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    twins = {key for key in keys if keys.count(key) > 1}
    if twins:
        raise _Twin(", ".join(f'"{key}"' for key in sorted(twins)))
    return dict(pairs)


def _remedy(error: json.JSONDecodeError) -> str:
    before, after = error.doc[:error.pos].rstrip(), error.doc[error.pos:].lstrip()
    if before.endswith(",") and after[:1] in ("}", "]") or after[:1] == ",":
        return "not JSON: a comma stands before the closing bracket: remove it"
    if error.msg == "Extra data" and before.startswith('"'):
        return 'not JSON: put { before the first key and } after the last value'
    return f"not JSON: {error.msg}"
