"""From the tables to what users read: OPTIONS.md, --help, and the JSON Schemas that editors complete keys with.

`python -m helpers.config.docs` writes the files anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from helpers.config.backends import KINDS, ConditioningBackend, ImageBackend, TextEmbedsBackend
from helpers.config.families import MODEL_TYPES, Family
from helpers.config.inference_options import INFERENCE_ROWS
from helpers.config.later import LATER_PREFIXES
from helpers.config.options import GROUPS, LAUNCH_ROWS, ROWS, Group, Row
from helpers.config.paths import ROOT
from helpers.config.problems import needs

TITLES: Mapping[str, str] = MappingProxyType({
    "model": "Model", "data": "Data", "training": "Training", "loss": "Loss", "lora": "LoRA",
    "optimizer": "Optimizer, schedule and average", "validation": "Validation", "run": "Run",
    "door": "The config file", "launch": "Launcher (exports only)",
})

INTRODUCTION = """\
# Options

<!-- Written by `python -m helpers.config.docs` from the tables in helpers/config. Edit those, not this. -->

Every option can be said in three ways, and all of them end in the same config:

- in `sd2x-env.sh`, as an export: `export LEARNING_RATE_END=4e-6`
- in `config.json`, by the flag's name: `"lr_end": 4e-6`
- as a flag: `./train.sh --lr_end=4e-6`, or `--lr_end 4e-6`

A flag wins over an export, an export over `config.json`, and that over the default. An empty export and a `null` are
not set. Switches are `true`/`false`, `1`/`0`, `yes`/`no` or `on`/`off` in any case; as a flag, `--dry_run` alone is
`--dry_run=true`. Relative paths count from the project's root. Both JSON files are strict JSON, but whole lines that
begin with `#` or `//` are comments.

A name that is not known is an error, and so is an export that is a letter or two away from one of these.
`./train.sh --dry_run` prints each option's value and where it comes from.
"""

BACKENDS_INTRODUCTION = """\
## The dataloader JSON

The file that `DATALOADER_CONFIG` names: an array of objects, one for each dataset, one for each folder of text
embeds, and with a ControlNet one for each folder of conditioning images. A key of a dataset overrides the flag of the
same name. Sizes are pixels of an edge, or megapixels where `resolution_type` is `area`.
"""


INFERENCE_INTRODUCTION = """\
## Pictures: `./inference.py`

Flags only: `--name=value` or `--name value`. [The guide](docs/inference.md) says how they are used.

| flag | value | default | |
|---|---|---|---|
"""


def files() -> dict[Path, str]:
    """All generated files with their contents."""
    return {
        ROOT / "OPTIONS.md": options_page(),
        ROOT / "docs" / "schemas" / "config.schema.json": _json(config_schema()),
        ROOT / "docs" / "schemas" / "multidatabackend.schema.json": _json(backends_schema()),
    }


def options_page() -> str:
    """OPTIONS.md."""
    parts = [INTRODUCTION]
    for group, title in TITLES.items():
        parts.append(f"## {title}\n\n" + "\n".join(_table(group)) + "\n")
    parts += [BACKENDS_INTRODUCTION, _keys("Datasets", ImageBackend), _keys("Text embeds", TextEmbedsBackend)]
    parts += [_keys("Conditioning images, for a ControlNet", ConditioningBackend), _inference(), _later()]
    return "\n".join(parts)


def _inference() -> str:
    rows = INFERENCE_ROWS.values()
    lines = (f"| `--{row.name}` | {_value(row)} | {default_words(row)} | {row.field.description} |" for row in rows)
    return INFERENCE_INTRODUCTION + "\n".join(lines) + "\n"


def _rows(group: str) -> list[Row]:
    return [row for row in (*ROWS.values(), *LAUNCH_ROWS.values()) if row.group == group]


def _table(group: str) -> Iterator[str]:
    flags = group != "launch"
    yield ("| flag and key " if flags else "") + "| export | value | default | |"
    yield "|---" * (5 if flags else 4) + "|"
    for row in _rows(group):
        flag = f"| `--{row.name}` " if flags else ""
        exports = ", ".join(f"`{name}`" for name in row.all_exports)
        yield f"{flag}| {exports} | {_value(row)} | {default_words(row)} | {row.field.description} |"


def _value(row: Row) -> str:
    return needs(row.field) + (f" ({row.unit})" if row.unit else "")


def default_words(row: Row) -> str:
    """The default of an option, in words where it depends on others."""
    if row.by_family:
        defaults = {family.name: _of_family(family, row.name) for family, _ in MODEL_TYPES.values()}
        if len(set(defaults.values())) == 1:
            return next(iter(defaults.values()))
        return ", ".join(f"{value} ({name})" for name, value in defaults.items())
    return row.default_words or _default(row.field.default)


def _of_family(family: Family, name: str) -> str:
    others = {str(edge) for edge in family.resolutions.values()} if name == "resolution" else set()
    return " or ".join([_default(getattr(family, name)), *sorted(others)])


def _default(value: object) -> str:
    if value is None or value == "" or value == ():
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(entry) for entry in value)
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else f"{value}"


def _keys(title: str, model: type[Group]) -> str:
    lines = [f"### {title}\n", "| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        key, default = field.alias or name, _key_default(name, field)
        lines.append(f"| `{key}` | {needs(field)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _key_default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    inherits = name in ROWS and name != "cache_dir"
    return f"`--{name}`" if inherits else _default(field.default)


def _later() -> str:
    lines = [
        "## Known names without a meaning here\n",
        "Existing env files set these. Where they ask for nothing (off, 0, empty) they pass, else they are refused.\n",
    ]
    lines += [f"- exports that begin with `{prefix}`: {instead}" for prefix, instead in LATER_PREFIXES.items()]
    return "\n".join(lines) + "\n"


def help_text() -> str:
    """What --help prints: every option by group, with its export and default."""
    lines = [
        "usage: ./train.sh [--demo] [--config config.json] [--name=value ...]",
        "Options come from defaults < config.json < exports of sd2x-env.sh < flags. OPTIONS.md says more.",
    ]
    for group, title in TITLES.items():
        lines.append(f"\n{title}")
        for row in _rows(group):
            name = f"--{row.name}" if group != "launch" else row.exports[0]
            export = f" [{', '.join(row.all_exports)}]" if group != "launch" else ""
            lines.append(f"  {name:36} {row.field.description}")
            lines.append(f"  {'':36} {_value(row)}; default: {default_words(row)}{export}")
    return "\n".join(lines)


def inference_help() -> str:
    """What `inference.py --help` prints."""
    lines = [
        'usage: ./inference.py --prompt "a photo of ..." [--name=value ...], or ./inference.py --demo',
        "docs/inference.md says more.\n",
    ]
    for row in INFERENCE_ROWS.values():
        lines.append(f"  {'--' + row.name:24} {row.field.description}")
        lines.append(f"  {'':24} {_value(row)}; default: {default_words(row)}")
    return "\n".join(lines)


def config_schema() -> dict[str, Any]:
    """The JSON Schema of config.json."""
    properties: dict[str, Any] = {"$schema": {"type": "string"}}
    for model in GROUPS.values():
        properties |= _properties(model)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "FloydTuner: config.json",
        "type": "object", "properties": properties, "additionalProperties": False,
    }


def backends_schema() -> dict[str, Any]:
    """The JSON Schema of the dataloader JSON."""
    entry = _entry(ImageBackend)
    for kind, model in KINDS.items():
        is_kind = {"properties": {"dataset_type": {"const": kind}}, "required": ["dataset_type"]}
        entry = {"if": is_kind, "then": _entry(model), "else": entry}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "FloydTuner: dataloader JSON",
        "type": "array", "items": entry,
    }


def _entry(model: type[Group]) -> dict[str, Any]:
    properties = _properties(model)
    properties["disable"] = properties["disabled"]
    required = [field.alias or name for name, field in model.model_fields.items() if field.is_required()]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _properties(model: type[Group]) -> dict[str, Any]:
    """The schema of each field; titles repeat the names, and "option" is this table's own."""
    properties = model.model_json_schema(mode="validation")["properties"]
    drop = ("title", "option", "default")
    return {
        name: {key: value for key, value in schema.items() if key not in drop} for name, schema in properties.items()
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the generated files."""
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
