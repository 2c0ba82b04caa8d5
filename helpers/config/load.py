"""From what the user typed to one frozen Config: defaults < config.json < exports < flags, all problems in one list.

Both doors, train.sh and train_sd2x.py, come in through `load_all`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import ValidationError

from helpers.config.backends import Backends, load_backends
from helpers.config.checks import Start, problems_of_start
from helpers.config.checks import problems as problems_between
from helpers.config.docs import help_text
from helpers.config.families import Contradiction, Model, resolve
from helpers.config.jsonfile import read_json
from helpers.config.optimizers import OPTIMIZERS
from helpers.config.options import GROUPS, ROWS, SWITCH_WORDS, Config, ModelOptions, Row, parse_switch
from helpers.config.paths import from_root
from helpers.config.problems import (
    MOST_PROBLEMS,
    ConfigError,
    did_you_mean,
    found,
    invalid_values,
    key_name,
    needs,
)
from helpers.launch import rank_and_count
from helpers.sizes import Size

ENV_FILE_MARK = "FLOYDTUNER_ENV_FILE"
"""Set by train.sh to the env file that it read, so that a flag made from an export can be traced to it."""

DEFAULT_EPOCHS = 25

EVAL_IMAGES = 4
"""Of each dataset, with a ControlNet: prompts alone tell nothing of it."""

SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What `accelerate launch` sets for ways of training that split a model over several GPUs."""


@dataclass(frozen=True)
class Resolved:
    """A checked config. `sources` says for each option where its value comes from."""

    config: Config
    sources: Mapping[str, str]


class Exported(NamedTuple):
    """An export that sets an option: its name, and the value that its flag gets."""

    name: str
    value: str


class _Read(NamedTuple):
    """What was understood, with every option that is `refused` at its default, and all that is wrong."""

    resolved: Resolved
    refused: set[str]
    problems: list[str]


def load_all(
    argv: Sequence[str], environ: Mapping[str, str] = MappingProxyType({}), start: Start | None = None
) -> tuple[Resolved, Backends]:
    """Read flags, the config.json that they may name, and the dataloader JSON.

    `environ` gives no values: train.sh has turned exports into flags. It only tells which flags those are, and, unless
    `start` does, how a launcher started the trainer.

    Raises:
        ConfigError: with all problems of all three.
        SystemExit: after printing the options, if --help is among the flags.
    """
    read = _read(argv, environ)
    read.problems.extend([*_sharding(environ), *_left_alone(environ)])
    read.problems.extend(map(str, problems_of_start(read.resolved.config, start or _start(environ))))
    return _with_backends(read)


def _start(environ: Mapping[str, str]) -> Start:
    """As the launcher tells it: the names are those that `accelerate launch` sets."""
    backend, mode = (environ.get(f"ACCELERATE_DYNAMO_{name}", "").lower() for name in ("BACKEND", "MODE"))
    return Start(rank_and_count(environ)[1], backend or "no", mode or "default")


def load(argv: Sequence[str], environ: Mapping[str, str] = MappingProxyType({})) -> Resolved:
    """Like `load_all`, without the dataloader JSON."""
    resolved, _, problems = _read(argv, environ)
    if problems:
        raise ConfigError(problems)
    return resolved


def load_run(path: Path, changes: Mapping[str, Any]) -> tuple[Resolved, Backends]:
    """The options of a run again, from its run.json, with some of them changed; and its dataloader JSON as it is now.

    Raises:
        ConfigError: with all problems of both.
    """
    content, problems = read_json(path, "the run's options"), []
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ConfigError([f"{path}: it is no run.json: it has no options"])
    values, refused = _known({**options, **changes}, path, problems), set()
    config = _config(values, refused, problems)
    return _with_backends(_Read(Resolved(config, dict.fromkeys(values, path.name)), refused, problems))


def _with_backends(read: _Read) -> tuple[Resolved, Backends]:
    resolved, refused, problems = read
    config = resolved.config
    try:
        if "data_backend_config" not in refused:
            backends = load_backends(config.data.data_backend_config, config, refused)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return resolved, backends


def _read(argv: Sequence[str], environ: Mapping[str, str]) -> _Read:
    if {"--help", "-h"} & set(argv):
        print(help_text())
        raise SystemExit(0)
    flags, problems = read_flags(argv)
    config_file, keys = _config_file(flags.pop("config", ""), problems)
    # Of options that an unreadable file may have set, nothing is known.
    refused = set(ROWS) - set(flags) if keys is None else set()
    keys = keys or {}
    values = {**keys, **flags}
    config = _config(values, refused, problems)
    sources = {name: "default" for name, row in ROWS.items() if row.group in GROUPS}
    sources |= {name: config_file.name for name in keys if name in sources}
    sources |= {name: _flag_source(ROWS[name], value, environ) for name, value in flags.items() if name in sources}
    return _Read(Resolved(config, MappingProxyType(sources)), refused, problems)


def _sharding(environ: Mapping[str, str]) -> list[str]:
    return [
        f"ACCELERATE_EXTRA_ARGS: found {name}, which splits a model over several GPUs. Here each GPU trains all of it,"
        " LoRA and full alike, in a few GB (docs/deepfloyd.md has the figures): leave it out, and set"
        " TRAINING_NUM_PROCESSES to the number of GPUs"
        for variable, name in SHARDING.items()
        if environ.get(variable, "").lower() in ("1", "true", "yes")
    ]


def _left_alone(environ: Mapping[str, str]) -> list[str]:
    """What to say where `accelerate launch` was asked for several processes, and without GPUs started one."""
    if "ACCELERATE_USE_CPU" not in environ or "MASTER_PORT" not in environ or "WORLD_SIZE" in environ:
        return []
    return [
        "TRAINING_NUM_PROCESSES (accelerate's --num_processes): found more than 1, but `accelerate launch`"
        " started one, for lack of GPUs: type torchrun --nproc_per_node=2 train_sd2x.py, or ./train.sh with"
        " ACCELERATE_EXTRA_ARGS and TRAINING_DYNAMO_BACKEND unset"
    ]


def read_flags(argv: Sequence[str], rows: Mapping[str, Row] = ROWS) -> tuple[dict[str, str], list[str]]:
    """Split `--name=value`, `--name value` and bare switches; a later flag replaces an earlier one.

    Args:
        rows: the options that there are.

    Returns:
        the values by option name, and what is wrong with the rest.
    """
    flags: dict[str, str] = {}
    problems: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            problems.append(f"found {argument!r} where a flag is expected: type --name=value, with quotes round spaces")
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = _value_after(name, rest, rows)
        if name not in rows:
            problems.append(_unknown(f"--{name}", name, rows))
        elif value is None:
            problems.append(f"{rows[name].label}: no value, needs {needs(rows[name].field)}")
        else:
            flags[name] = value
    return flags, problems


def _value_after(name: str, rest: list[str], rows: Mapping[str, Row]) -> str | None:
    """Take the value of `--name value` from `rest`; a switch alone is true, others may have a value for that too."""
    follows = bool(rest) and not rest[0].startswith("--")
    if name in rows and rows[name].is_switch:
        return rest.pop(0) if follows and rest[0].strip().lower() in SWITCH_WORDS else "true"
    bare = rows[name].bare if name in rows else ""
    return rest.pop(0) if follows else bare or None


def _unknown(shown: str, name: str, rows: Mapping[str, Row] = ROWS) -> str:
    by_export = {export: row for row in rows.values() for export in row.all_exports}
    if name.upper() in by_export:
        row = by_export[name.upper()]
        return f"{shown}: not an option; that is the export of --{row.name}"
    dashes = "--" if shown.startswith("--") else ""
    hint = did_you_mean(dashes + name, [dashes + known for known in rows])
    return f"{shown}: not an option{hint or '; OPTIONS.md lists them'}"


def _config_file(typed: str, problems: list[str]) -> tuple[Path | None, dict[str, Any] | None]:
    """The path of config.json, if there is one, and its values, None if they cannot be read."""
    if not typed:
        return None, {}
    try:
        path = from_root(typed)
    except ValueError as error:
        problems.append(f"{ROWS['config'].label}: found {found(typed)}, {error}")
        return None, None
    return path, _read_config_file(path, problems)


def _read_config_file(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The values of config.json, None if it cannot be read; a null counts as not set, `$schema` is for editors."""
    try:
        content = read_json(path, ROWS["config"].label)
    except ConfigError as error:
        problems += error.problems
        return None
    if not isinstance(content, dict):
        problems.append(f"{path}: needs one object of options: {{\"model_type\": ...}}")
        return None
    content.pop("$schema", None)
    return _known(content, path, problems)


def _known(content: Mapping[str, Any], path: Path, problems: list[str]) -> dict[str, Any]:
    """The values of a file's options, without nulls; its unknown names become problems."""
    unknown = [name for name in content if name not in ROWS or name == "config"]
    problems += [_unknown(f"{path.name}, key {key_name(name)}", name.lstrip("-")) for name in unknown[:MOST_PROBLEMS]]
    left = set(unknown)
    return {name: value for name, value in content.items() if name not in left and value is not None}


def _config(values: Mapping[str, Any], refused: set[str], problems: list[str]) -> Config:
    """A config of all values that are right by themselves.

    The options that are wrong are added to `refused`, and the words for it to `problems`.
    """
    groups = {}
    for group, model in GROUPS.items():
        own = {name: value for name, value in values.items() if name in model.model_fields}
        try:
            groups[group] = model.model_validate(own)
        except ValidationError as error:
            invalid = invalid_values(error, model.model_fields)
            problems += [_invalid(ROWS[name], own[name], words) for name, words in invalid.items()]
            groups[group] = model.model_validate({name: own[name] for name in own if name not in invalid})
            refused |= set(invalid)
    given = set(values) - refused
    model = _resolve(groups["model"], refused, problems)
    config = _completed(Config(**groups), given, model)
    between = [problem for problem in problems_between(config) if not refused & set(problem.options)]
    problems += [str(problem) for problem in between]
    refused |= {problem.options[0] for problem in between}
    problems += _prompt_library_problems(config.validation.validation_prompt_library)
    return config


def _invalid(row: Row, value: object, words: str) -> str:
    instead = row.refused.get(str(value).strip().lower())
    return f"{row.label}: " + (f"found {found(value)}; {instead}" if instead else words)


def _resolve(options: ModelOptions, refused: set[str], problems: list[str]) -> Model:
    """The model to train; where there is none, the first family's, so that the other options can be checked."""
    try:
        return resolve(
            options.model_type, options.model_family, options.model_flavour, options.pretrained_model_name_or_path
        )
    except Contradiction as error:
        if not refused & set(ModelOptions.model_fields):
            problems.append(f"{ROWS[error.option].label}: {error}")
        refused.add("model_type")
        return resolve("deepfloyd-lora", None, None, None)


def _completed(config: Config, given: set[str], model: Model) -> Config:
    """`config` with the defaults that follow from the family and from other options."""
    by_family = {
        name: getattr(model.as_trained, name) for name, row in ROWS.items() if row.by_family and name not in given
    }
    epochs = 0 if config.training.max_train_steps else DEFAULT_EPOCHS
    optimizer = config.optimizer.optimizer or ("adamw_bf16" if config.training.pure_bf16 else "adamw")
    by_optimizer = {"learning_rate": OPTIMIZERS[optimizer].learning_rate, "adam_beta2": OPTIMIZERS[optimizer].beta2}
    filled = {
        "model": _model_values(model),
        "data": {name: value for name, value in by_family.items() if ROWS[name].group == "data"},
        "validation": {name: value for name, value in by_family.items() if ROWS[name].group == "validation"}
        | _validation_values(config, given, model),
        "training": {} if "num_train_epochs" in given else {"num_train_epochs": epochs},
        "optimizer": {"optimizer": optimizer} | {
            name: value for name, value in by_optimizer.items() if getattr(config.optimizer, name) is None
        },
    }
    return config.model_copy(update={
        group: getattr(config, group).model_copy(update=values) for group, values in filled.items()
    })


def _validation_values(config: Config, given: set[str], model: Model) -> dict[str, Any]:
    """Validation images are of the size of training, unless it is told otherwise."""
    data, family = config.data, model.as_trained
    is_edge = "resolution" in given and data.resolution_type == "pixel" and data.resolution % family.alignment == 0
    edge = int(data.resolution) if is_edge else family.resolution
    # Lin et al. 2024 take 0.7: with less, guidance burns out pictures that are sampled from noise alone.
    rescaled = config.loss.rescale_betas_zero_snr and family.guidance_rescale and not config.training.controlnet
    defaults = {"validation_resolution": (Size(edge, edge),), "validation_guidance_rescale": 0.7 if rescaled else 0.0}
    if config.training.controlnet and family.controlnet:
        defaults["num_eval_images"] = EVAL_IMAGES
    return {name: value for name, value in defaults.items() if name not in given}


def _model_values(model: Model) -> dict[str, Any]:
    return {
        "model_type": model.model_type,
        "model_family": model.family.model_family,
        "model_flavour": model.flavour,
        "pretrained_model_name_or_path": model.name,
    }


def read_prompt_library(path: Path) -> dict[str, str]:
    """Read validation prompts, {name: prompt}.

    Raises:
        ConfigError: if the file is not such an object.
    """
    label = ROWS["validation_prompt_library"].label
    content = read_json(path, label)
    if not isinstance(content, dict) or not all(isinstance(prompt, str) and prompt for prompt in content.values()):
        raise ConfigError([f'{label}: {path} needs one object of texts: {{"name": "prompt", ...}}'])
    return content


def _prompt_library_problems(path: Path | None) -> tuple[str, ...]:
    try:
        if path is not None:
            read_prompt_library(path)
    except ConfigError as error:
        return error.problems
    return ()


def exported(row: Row, environ: Mapping[str, str]) -> list[Exported]:
    """The exports that set `row`, with their values as its flag takes them; an empty export is not set.

    Raises:
        ValueError: in words, if a switch is neither on nor off.
    """
    values = [Exported(name, environ[name]) for name in row.exports if environ.get(name, "").strip()]
    for name, value in row.switches.items():
        word = environ.get(name, "").strip()
        if word and _is_on(row, name, word):
            values.append(Exported(name, value))
    return values


def _is_on(row: Row, export: str, word: str) -> bool:
    try:
        return parse_switch(word)
    except ValueError:
        raise ValueError(f"{row.label}: found {word!r} in export {export}, needs true or false") from None


def _flag_source(row: Row, value: str, environ: Mapping[str, str]) -> str:
    env_file = environ.get(ENV_FILE_MARK)
    if env_file is None:
        return "flag"
    names = [export.name for export in exported(row, environ) if export.value == value]
    return f"export {names[0]} ({env_file or 'environment'})" if names else "flag"


def plain(value: object) -> object:
    """An option's value as config.json could hold it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return ",".join(str(Size(*size)) for size in value)
    return value


def as_json(resolved: Resolved) -> dict[str, Any]:
    """The resolved options and their sources, for run.json: {"options": {name: value}, "sources": {name: source}}.

    "options" can be used as a config.json again.
    """
    config = resolved.config
    options = {name: plain(getattr(getattr(config, row.group), name)) for name, row in _rows_of_config()}
    return {"options": options, "sources": dict(resolved.sources)}


def describe(resolved: Resolved, everything: bool = True) -> str:
    """The resolved options as text, one a line with its source, those that someone set marked by a star.

    Args:
        everything: also those that have their default.
    """
    content = as_json(resolved)
    lines = []
    for group in GROUPS:
        names = [name for name, row in _rows_of_config() if row.group == group]
        shown = [name for name in names if everything or content["sources"][name] != "default"]
        lines += [f"[{group}]"] if shown else []
        for name in shown:
            source = content["sources"][name]
            value = "-" if content["options"][name] is None else found(content["options"][name])
            lines.append(f"{' ' if source == 'default' else '*'} {name:32} {value:40} {source}")
    return "\n".join(lines)


def _rows_of_config() -> list[tuple[str, Row]]:
    return [(name, row) for name, row in ROWS.items() if row.group in GROUPS]
