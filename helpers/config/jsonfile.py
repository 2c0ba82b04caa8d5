"""Reading JSON files that anyone may have written: strict, bounded in time and memory, every refusal in words."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path

from helpers.config.problems import ConfigError, key_name

COMMENT_LINE = re.compile(r"^[ \t]*(#|//).*$", re.MULTILINE)
"""A whole line of comment. No JSON string goes over several lines, so none can be hit."""

MAX_BYTES = 5_000_000
"""The largest file that is read: 10,000 prompts of 500 letters. As Python's objects it takes under 200 MB."""

MAX_DEPTH = 50
"""How deep objects and lists may lie in each other; what we read needs 4, a model's config 5."""


class BadJson(ValueError):
    """A file that is no JSON as it is read here; `str()` says why and what to do, without the file's name."""


def load_json(
    path: Path, max_bytes: int = MAX_BYTES, comments: bool = False, minus_infinity: bool = False
) -> object:
    """Read strict JSON in UTF-8: each key once in its object, no NaN, no infinity, at most `MAX_DEPTH` deep.

    Args:
        comments: skip whole lines of `#` or `//` comment.
        minus_infinity: allow -Infinity, which is no JSON, but which Python writes.

    Raises:
        OSError: if the file cannot be read.
        BadJson: if it is no regular file, too large, too deep, or not JSON.
    """
    text = _text(path, max_bytes)
    if comments:
        text = COMMENT_LINE.sub("", text)
    constant = _minus_infinity if minus_infinity else _no_number
    try:
        content = json.loads(
            text, object_pairs_hook=_without_twins, parse_constant=constant, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        raise BadJson(f"line {error.lineno}, column {error.colno}: {_remedy(error)}") from None
    except RecursionError:
        raise BadJson(_too_deep()) from None
    _levels(content)
    return content


def read_json(path: Path, option: str) -> object:
    """Read strict JSON, but for whole lines of `#` or `//` comment, which are skipped.

    `option` names the option that led to the file, for the message.

    Raises:
        ConfigError: if the file cannot be read, `load_json` refuses it, or it holds text that UTF-8 cannot.
    """
    try:
        content = load_json(path, comments=True)
        _require_unicode(content)
        return content
    except FileNotFoundError:
        raise ConfigError([f"{option}: there is no file {path}"]) from None
    except OSError as error:
        raise ConfigError([f"{option}: {path} cannot be read: {error}"]) from None
    except BadJson as error:
        raise ConfigError([f"{option}: {path}, {error}"]) from None


def _text(path: Path, max_bytes: int) -> str:
    try:
        # A pipe would hang `open`, so the kind of file is asked first.
        kind = os.stat(path).st_mode
    except ValueError:  # a NUL, which no path has
        raise BadJson("there can be no such file: type the path of a JSON file") from None
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # `open` has words of its own for a folder
        raise BadJson("which is not a regular file: type the path of a JSON file")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
        size = os.fstat(file.fileno()).st_size
    if len(content) > max_bytes:
        most = f"at most {max_bytes / 1e6:g} MB are read"
        raise BadJson(f"{size / 1e6:,.1f} MB large, where {most}: is it the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadJson(f"not UTF-8 text, at byte {error.start:,} ({error.reason}): save it as UTF-8") from None


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twins = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadJson(f"key {key_name(twins[0])} is there twice in one object: remove one")
    return content


def _no_number(word: str) -> object:
    raise BadJson(f"not JSON: {word} is no number: type one, or null")


def _minus_infinity(word: str) -> object:
    return -math.inf if word == "-Infinity" else _no_number(word)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise BadJson(f"{digits[:20]} is too large for a number: type a smaller one")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 400:  # Python itself refuses thousands of digits, and floats end at 309
        raise BadJson(f"found a number of {len(digits):,} digits: type a smaller one")
    return int(digits)


def _levels(content: object) -> list[list[object]]:
    """Everything in `content` by its depth. Without recursion, which ends in an error of its own.

    Raises:
        BadJson: there are too many levels.
    """
    levels = [[content]]
    while containers := [item for item in levels[-1] if isinstance(item, (dict, list))]:
        if len(levels) > MAX_DEPTH:
            raise BadJson(_too_deep())
        levels.append([
            inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)
        ])
    return levels


def _require_unicode(content: object) -> None:
    """See that every text can be printed, and written as UTF-8."""
    for item in itertools.chain.from_iterable(_levels(content)):
        for text in item if isinstance(item, dict) else [item]:
            if isinstance(text, str) and not _is_unicode(text):
                raise BadJson(f"found {key_name(text)}, half of a UTF-16 pair: save it as UTF-8, without \\u escapes")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep() -> str:
    return f"objects or lists lie more than {MAX_DEPTH} deep in each other: is it the right file?"


def _remedy(error: json.JSONDecodeError) -> str:
    before, after = error.doc[:error.pos].rstrip(), error.doc[error.pos:].lstrip()
    if before.endswith(",") and after[:1] in ("}", "]") or after[:1] == ",":
        return "not JSON: a comma stands before the closing bracket: remove it"
    if error.msg == "Extra data" and before.startswith('"'):
        return 'not JSON: put { before the first key and } after the last value'
    return f"not JSON: {error.msg}"
