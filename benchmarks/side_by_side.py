"""Two trainers beside one another: the same data, batch, steps and precision, in turns, watched from outside."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.machine import ROOT, write_result

WARM_UP = 10
LAST_LINES = 15
NEEDS = ("datasets", "torchvision")
"""What examples of diffusers import besides this project's packages."""
WATCHED = ROOT / "benchmarks" / "watched.py"
LEARNING_RATE = 1e-5
EXAMPLE, OURS, OURS_IN_BF16 = "example", "ours", "ours in pure bf16"


@dataclass(frozen=True)
class Setup:
    """What both trainers are told.

    Attributes:
        precision: "bf16" or "no".
        steps: of each run.
        workers: processes that load the example's images; ours has its own thread.
    """

    pipeline: Path
    images: Path
    resolution: int
    batch: int
    rank: int
    steps: int
    precision: str
    checkpointing: bool
    workers: int


@dataclass(frozen=True)
class Figures:
    """What one run took. Seconds and 1e9 bytes; `peak_gb_of_training` is not known of a CPU."""

    samples_a_second: float
    seconds_to_first_step: float
    peak_gb: float
    peak_gb_of_training: float | None


@dataclass(frozen=True)
class Target:
    """How many times the example's figures ours should have at the same batch: its speed at least, the others at most.

    `start` is that to the end of the first step, where a run before has cached what it can.
    """

    speed: float
    peak: float | None = None
    start: float | None = None


Command = Callable[[Setup, Path, Path], list[str]]
"""A trainer's script and flags, by the setup, the folder of what its runs cache, and that of what one run writes."""


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Attributes:
        example: the other trainer's command.
        ours: our own flags, besides those of `our_command`.
        make: writes pipeline and images, by the setup and whether the pipeline is of full size.
        target: by the setup and whether it is measured on a GPU.
        resolution: pixels, by whether the pipeline is of full size.
    """

    example: Command
    ours: Sequence[str]
    make: Callable[[Setup, bool], None]
    target: Callable[[Setup, bool], Target]
    resolution: Callable[[bool], int]
    dataset: Mapping[str, object] = field(default_factory=dict)


def missing_needs(script: Path) -> list[str]:
    """The packages that a script imports at its beginning, and that are not installed."""
    names: list[str] = []
    for node in ast.parse(script.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    roots = dict.fromkeys(name.partition(".")[0] for name in names)
    return [name for name in roots if find_spec(name) is None]


def our_command(contest: Contest, setup: Setup, cache: Path, folder: Path, pure_bf16: bool = False) -> list[str]:
    """Our own trainer's."""
    dataset = {
        "id": "photos",
        "instance_data_dir": str(setup.images),
        "resolution": setup.resolution,
        "crop_style": "center",
        **contest.dataset,
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.json"
    data.write_text(json.dumps([dataset]), "utf-8")
    return [
        str(ROOT / "train_sd2x.py"),
        f"--pretrained_model_name_or_path={setup.pipeline}",
        f"--data_backend_config={data}",
        f"--cache_dir={cache}",
        f"--output_dir={folder / 'output'}",
        "--resume_from_checkpoint=none",
        f"--resolution={setup.resolution}",
        "--resolution_type=pixel",
        f"--validation_resolution={setup.resolution}",  # of no validation, but it is checked beside the other
        "--caption_dropout_probability=0",
        f"--train_batch_size={setup.batch}",
        f"--max_train_steps={setup.steps}",
        "--checkpointing_steps=0",
        f"--learning_rate={LEARNING_RATE}",
        "--lr_scheduler=constant",
        f"--mixed_precision={setup.precision}",
        f"--pure_bf16={str(pure_bf16).lower()}",
        f"--lora_rank={setup.rank}",
        f"--gradient_checkpointing={str(setup.checkpointing).lower()}",
        "--seed=42",
        *contest.ours,
    ]


def watched(name: str, command: Sequence[str], setup: Setup, folder: Path) -> Figures:
    """Run a trainer to its end.

    Raises:
        SystemExit: it failed, or made other steps than it was told; with its last lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, log = folder / "report.json", folder / "log.txt"
    with log.open("wb") as out:
        # The pipeline and the images are here: nothing is to be asked of a hub.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        run = [sys.executable, str(WATCHED), str(report), *command]
        code = subprocess.run(run, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=environment).returncode
    told = json.loads(report.read_text("utf-8")) if report.exists() else {"seconds_of_steps": []}
    ends = told["seconds_of_steps"]
    if code or len(ends) != setup.steps:
        lines = "\n".join(log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:])
        raise SystemExit(f"{name} made {len(ends)} of {setup.steps} steps, and ended with exit code {code}:\n{lines}")
    first = min(WARM_UP, (len(ends) - 1) // 2)
    seconds_a_step = (ends[-1] - ends[first]) / (len(ends) - 1 - first)
    return Figures(setup.batch / seconds_a_step, ends[0], told["peak_gb"], told.get("peak_gb_of_training"))


def measure(contest: Contest, setup: Setup, rounds: int, folder: Path) -> dict[str, object]:
    """Figures of the example and of ours, and of ours how many times the example's they are."""
    commands: dict[str, Command] = {EXAMPLE: contest.example, OURS: partial(our_command, contest)}
    if setup.precision == "bf16":
        commands[OURS_IN_BF16] = partial(our_command, contest, pure_bf16=True)
    runs: dict[str, list[Figures]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name, command in commands.items():
            place = folder / name / f"run {turn}"
            runs[name].append(watched(name, command(setup, folder / name / "cache", place), setup, place))
            print(name, runs[name][-1], flush=True)
    target = contest.target(setup, torch.cuda.is_available())
    result: dict[str, object] = {name: _summary(figures) for name, figures in runs.items()}
    for name in runs.keys() - {EXAMPLE}:
        result[name] |= compared(runs[name], runs[EXAMPLE], target)
    return {**result, "target": vars(target)}


def _summary(runs: Sequence[Figures]) -> dict[str, object]:
    starts = [run.seconds_to_first_step for run in runs]
    training = [run.peak_gb_of_training for run in runs if run.peak_gb_of_training is not None]
    return {
        "samples_a_second": _median(run.samples_a_second for run in runs),
        "peak_gb": _median(run.peak_gb for run in runs),
        **({"peak_gb_of_training": _median(training)} if training else {}),
        "seconds_to_first_step": _rounded(starts[0]),
        **({"seconds_to_first_step_later": _median(starts[1:])} if starts[1:] else {}),
    }


def compared(ours: Sequence[Figures], example: Sequence[Figures], target: Target) -> dict[str, object]:
    """Each round of ours beside the example's; of the start those after the first."""
    pairs = list(zip(ours, example))
    figures: dict[str, object] = {
        "times_its_speed": _median(mine.samples_a_second / other.samples_a_second for mine, other in pairs),
        "times_its_peak": _median(mine.peak_gb / other.peak_gb for mine, other in pairs),
    }
    if pairs[1:]:
        starts = (mine.seconds_to_first_step / other.seconds_to_first_step for mine, other in pairs[1:])
        figures["times_its_start_later"] = _median(starts)
    reached = figures["times_its_speed"] >= target.speed
    reached &= target.peak is None or figures["times_its_peak"] <= target.peak
    reached &= target.start is None or figures.get("times_its_start_later", target.start) <= target.start
    return {**figures, "reaches_target": reached}


def _median(values: Iterable[float]) -> float:
    return _rounded(statistics.median(values))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def describe_example(script: Path) -> dict[str, str]:
    """Which file it was, and the versions of what it needs besides this project's packages."""
    installed = [name for name in NEEDS if find_spec(name)]
    versions = {name: version(name) for name in installed}
    return {"script": script.name, "sha256": hashlib.sha256(script.read_bytes()).hexdigest(), **versions}


def contest(contest: Contest, options: argparse.Namespace) -> dict[str, object]:
    """Make what is needed in a temporary folder, measure, and keep the result.

    Raises:
        SystemExit: the example needs a package that is not installed, or a run failed.
    """
    if missing := missing_needs(options.script):
        raise SystemExit(f"{options.script.name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="floydtuner-benchmark-", dir=options.folder) as name:
        setup = setup_of(contest, options, Path(name))
        contest.make(setup, options.full_size)
        figures = measure(contest, setup, options.rounds, Path(name))
    facts = {"resolution": setup.resolution, "batch": setup.batch, "rank": setup.rank, "precision": setup.precision}
    facts |= {"gradient_checkpointing": setup.checkpointing, "full_size": options.full_size}
    facts |= {"steps": setup.steps, "rounds": options.rounds}
    return write_result(options.output, {**facts, **figures, "example_was": describe_example(options.script)})


def setup_of(contest: Contest, options: argparse.Namespace, folder: Path) -> Setup:
    return Setup(
        pipeline=folder / "pipeline",
        images=folder / "images",
        resolution=options.resolution or contest.resolution(options.full_size),
        batch=options.batch,
        rank=options.rank,
        steps=options.steps,
        precision="bf16" if torch.cuda.is_available() else "no",
        checkpointing=options.gradient_checkpointing,
        workers=options.workers,
    )


def parse(doc: str, result: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a benchmark.

    Args:
        result: the name of its file in `benchmarks/results`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="the example of diffusers")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--resolution", type=int, help="default: that of the pipeline")
    parser.add_argument("--steps", type=int, default=100, help="of each run; 3 at the least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both")
    workers = min(4, (os.cpu_count() or 1) - 1)
    parser.add_argument("--workers", type=int, default=workers, help="processes that load the example's images")
    full_size = argparse.BooleanOptionalAction
    parser.add_argument("--full_size", action=full_size, default=torch.cuda.is_available(), help="or --no-full_size")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder: 5 GB at full size")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / result)
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps: found {options.steps}, type 3 or more")
    if not options.script.is_file():
        parser.error(f"{options.script}: no such file; see the examples of https://github.com/huggingface/diffusers")
    options.script = options.script.resolve()
    return options
