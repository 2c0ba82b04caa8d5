"""For train.sh: from the exports of the env file and the typed flags to the command line that starts the trainer.

`python -m helpers.config.env [flags...]` prints it, quoted for a shell to `eval`; wrong input ends it with code 2.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from pydantic import ValidationError

from helpers.config.checks import Start
from helpers.config.later import LATER_PREFIXES, prefixed_problem
from helpers.config.load import exported, load_all, read_flags
from helpers.config.options import LAUNCH_ROWS, ROWS, Config, LaunchOptions
from helpers.config.problems import ConfigError, found, invalid_values, letters_apart

OUTER_NAMES = "FLOYDTUNER_OUTER"
"""Set by train.sh to the names, one a line, that were in the environment before it read the env file."""

STRANGERS = frozenset({"BASE_DIR", "LOCAL_RANK", "CCACHE_DIR"})
STRANGE_PREFIXES = (
    "_", "FLOYDTUNER_", "HF_", "HUGGINGFACE_", "WANDB_", "CUDA_", "HIP_", "ROCM_", "NCCL_", "NVIDIA_", "OMP_", "MKL_",
    "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRANSFORMERS_", "DIFFUSERS_", "ACCELERATE_", "PYTHON", "PIP_", "CONDA_",
    "XDG_", "LC_", "SLURM_", "AWS_",
)
"""Other people's variables, which are never taken for misspelled ones of ours."""

LETTERS = 2
"""How far a name may be from one of ours to be taken for a slip."""


def command_line(argv: Sequence[str], environ: Mapping[str, str], outer: AbstractSet[str], python: str) -> list[str]:
    """The words that start the trainer.

    Args:
        argv: the flags typed after train.sh; they replace exports of the same option.
        environ: the environment after the env file was read.
        outer: the names that were in it before; of them only a slip in a long name counts as one.
        python: the interpreter to run.

    Raises:
        ConfigError: with all problems of exports, flags, config.json and the dataloader JSON.
    """
    problems = [*misspelled(environ, outer), *_later_problems(environ)]
    launch = _launch_options(environ, problems)
    accelerate_args = _split(launch.accelerate_args, "accelerate_args", problems)
    typed = [*_trainer_args(launch, problems), *argv]
    flags = [*flags_from_exports(environ, typed, problems), *typed]
    try:
        start = Start(launch.num_processes, launch.dynamo_backend.lower(), launch.dynamo_mode)
        config = load_all(flags, start=start)[0].config
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return [python, *_accelerate(launch, accelerate_args, config), "train_sd2x.py", *flags]


def flags_from_exports(environ: Mapping[str, str], typed: Sequence[str], problems: list[str]) -> list[str]:
    """A flag for each export that is set and not replaced by a typed flag; wrong exports go to `problems`."""
    replaced = read_flags(typed)[0]
    flags = []
    for name, row in ROWS.items():
        try:
            exports = exported(row, environ)
        except ValueError as error:
            problems.append(str(error))
            continue
        if len({export.value for export in exports}) > 1:
            said = " and ".join(f"{export.name}={found(environ[export.name])}" for export in exports)
            problems.append(f"{row.label}: found {said}, which contradict each other: remove one")
        elif exports and name not in replaced:
            flags.append(f"--{name}={exports[0].value}")
    return flags


def misspelled(environ: Mapping[str, str], outer: AbstractSet[str]) -> list[str]:
    """What to say of names that are a slip away from one of ours.

    Names that the env file did not set belong to the user's shell, so only long ones are taken for slips there.
    """
    meant = {name: _meant(name, 12 if name in outer else 6) for name in sorted(environ)}
    return [f"export {name}: not an option; did you mean {own}?" for name, own in meant.items() if own]


def _meant(name: str, shortest: int) -> str | None:
    """Which of our exports, of so many letters or more, `name` is a slip of."""
    ours = known_exports()
    if name in ours or _is_strange(name):
        return None
    near = [own for own in ours if len(own) >= shortest and abs(len(own) - len(name)) <= LETTERS]
    near = [own for own in near if letters_apart(name, own) <= LETTERS]
    return min(near, key=lambda own: (letters_apart(name, own), own)) if near else None


def strange(environ: Mapping[str, str], outer: AbstractSet[str]) -> list[str]:
    """The names in capitals that the env file set and that nobody is known to read."""
    ours = known_exports()
    prefixes = tuple(LATER_PREFIXES)
    own = (name for name in environ if name.isupper() and name not in outer and name not in ours)
    return sorted(name for name in own if not _is_strange(name) and not name.startswith(prefixes))


def known_exports() -> set[str]:
    """Every export that has a meaning here."""
    return {name for row in (*ROWS.values(), *LAUNCH_ROWS.values()) for name in row.all_exports}


def _is_strange(name: str) -> bool:
    return name in STRANGERS or name.startswith(STRANGE_PREFIXES)


def _later_problems(environ: Mapping[str, str]) -> list[str]:
    ours = known_exports()
    others = {name: value for name, value in environ.items() if name not in ours and not _meant(name, 12)}
    by_prefix = [prefixed_problem(name, value) for name, value in others.items()]
    return [problem for problem in by_prefix if problem]


def _launch_options(environ: Mapping[str, str], problems: list[str]) -> LaunchOptions:
    values = {name: environ.get(row.exports[0], "").strip() for name, row in LAUNCH_ROWS.items()}
    values = {name: value for name, value in values.items() if value}
    try:
        launch = LaunchOptions(**values)
    except ValidationError as error:
        wrong = invalid_values(error, LaunchOptions.model_fields)
        problems += [f"{LAUNCH_ROWS[name].label}: {words}" for name, words in wrong.items()]
        launch = LaunchOptions(**{name: value for name, value in values.items() if name not in wrong})
    if launch.num_machines > 1:
        words = f"found {launch.num_machines}, but all processes train on one machine: set it to 1"
        problems.append(f"{LAUNCH_ROWS['num_machines'].label}: {words}")
    if launch.dynamo_mode != "default" and not launch.compiles:
        backend = LAUNCH_ROWS["dynamo_backend"].exports[0]
        words = f"found {launch.dynamo_mode} without {backend}, which decides whether to compile: set that to inductor"
        problems.append(f"{LAUNCH_ROWS['dynamo_mode'].label}: {words}")
    return launch


def _split(words: str, name: str, problems: list[str]) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        problems.append(f"{LAUNCH_ROWS[name].label}: found {found(words)}: {str(error).lower()}")
        return []


def _trainer_args(launch: LaunchOptions, problems: list[str]) -> list[str]:
    words = _split(launch.trainer_args, "trainer_args", problems)
    if {"--help", "-h"} & set(words):
        problems.append(f"{LAUNCH_ROWS['trainer_args'].label}: found --help: type ./train.sh --help")
    return [word for word in words if word not in ("--help", "-h")]


def _accelerate(launch: LaunchOptions, extra: Sequence[str], config: Config) -> list[str]:
    """The words before the script, which is started directly where nothing is asked of `accelerate launch`.

    It would load torch a second time, and turn every exit code of the trainer into 1 behind a traceback of its own.
    """
    if not extra and not launch.compiles:
        return [] if launch.num_processes == 1 else ["-m", "helpers.launch", str(launch.num_processes)]
    return [
        "-m", "accelerate.commands.launch", "--quiet", f"--num_processes={launch.num_processes}", "--num_machines=1",
        f"--mixed_precision={config.training.mixed_precision}", f"--dynamo_backend={launch.dynamo_backend}",
        f"--dynamo_mode={launch.dynamo_mode}", *extra,
    ]


def main() -> int:
    """Print the command line, or the problems and return 2."""
    outer = frozenset(os.environ.get(OUTER_NAMES, "").split("\n"))
    environ = {name: value for name, value in os.environ.items() if name != OUTER_NAMES}
    try:
        words = command_line(sys.argv[1:], environ, outer, sys.executable)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    unknown = strange(environ, outer)
    if unknown:
        print(f"Not options of FloydTuner, and left alone: {', '.join(unknown)}", file=sys.stderr)
    # Bytes, because a path or a prompt need not be text in the terminal's encoding.
    sys.stdout.buffer.write(os.fsencode(shlex.join(words)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
