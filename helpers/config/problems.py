"""How wrong input is reported: which option, what was found, what it needs. All problems at once."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from helpers.files import on_one_line
from helpers.sizes import Size

LONGEST_SHOWN = 400
"""How many letters of a value messages show."""

LONGEST_PROBLEM = 2000

MOST_PROBLEMS = 30
"""How many problems are shown: a file of a thousand wrong keys is the wrong file."""


class ConfigError(ValueError):
    """The user's input has problems; `problems` holds one sentence for each, `str()` as many as are of use."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = "There is a problem" if len(self.problems) == 1 else f"There are {len(self.problems)} problems"
        lines = [f"  - {_shortened(problem, LONGEST_PROBLEM)}" for problem in self.problems[:MOST_PROBLEMS]]
        more = len(self.problems) - len(lines)
        super().__init__("\n".join([f"{count} with the options:", *lines, *([f"  and {more:,} more"] if more else [])]))


def found(value: object) -> str:
    """`value` as its user wrote it: text in quotes, anything else as JSON; the middle of what is very long left out."""
    shown = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _shortened(shown, LONGEST_SHOWN)


def _shortened(text: str, longest: int) -> str:
    """`text` on one line of about so many letters: its beginning and its end."""
    half = longest // 2
    return on_one_line(text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}")


def key_name(key: str) -> str:
    """The key of a JSON file as messages show it: in double quotes, on one line."""
    return found([key])[1:-1]


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """A question to end a message with, empty where nothing is close."""
    if len(name) > LONGEST_SHOWN:
        return ""
    candidates = {candidate.lower(): candidate for candidate in names}
    close = get_close_matches(name.lower(), list(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {candidates[close[0]]}?" if close else ""


def letters_apart(a: str, b: str) -> int:
    """How many letters must be typed, removed or replaced to make `b` of `a`."""
    changes = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in changes if kind != "equal")


def one_of(choices: Iterable[str]) -> str:
    choices = list(choices)
    return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]


def needs(field: FieldInfo) -> str:
    """What an option's value must be, in words: "a number above 0", "one of pixel, area"."""
    kind = _without_none(field.annotation)
    if get_origin(kind) is Literal:
        return one_of(get_args(kind))
    if kind is bool:
        return "true or false"
    if kind is int:
        return "a whole number" + _limits(field)
    if kind is float:
        return "a number" + _limits(field)
    if kind is Path:
        return "a path"
    if get_origin(kind) is tuple and Size in get_args(kind):
        return "sizes like 64 or 96x64, with commas between them"
    if get_origin(kind) is tuple:
        return "a list"
    return "text"


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`, and the bare type of an annotated one."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    return getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation


def _limits(field: FieldInfo) -> str:
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    limits = [
        f"{word} {getattr(limit, name):g}"
        for limit in field.metadata for name, word in words.items() if getattr(limit, name, None) is not None
    ]
    return " " + " and ".join(limits) if limits else ""


def invalid_values(error: ValidationError, fields: Mapping[str, FieldInfo]) -> dict[str, str]:
    """What is wrong with each named value that pydantic refused: {name: "found 'abc', needs a number"}."""
    words = {}
    for item in error.errors():
        name = str(item["loc"][0])
        needed = needs(fields[name])
        own = str(item["ctx"]["error"]) if item["type"] == "value_error" else ""
        if own.startswith("needs ") or needed in ("text", "true or false", "a list") or needed.startswith("sizes"):
            needed = own.removeprefix("needs ") or needed
        choices = needed.removeprefix("one of ").split(", ") if needed.startswith("one of ") else []
        words[name] = f"found {found(item['input'])}, needs {needed}" + did_you_mean(str(item["input"]), choices)
    return words
