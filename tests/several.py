"""Trains in several processes, and writes down what each of them did.

    python -m tests.several '[{"folder": ".../a", "count": 2, "flags": [...], "spoil": 1, "asked": {"2": "SIGUSR1"}}]'

The runs come one after another, each in forks of this process, which has imported torch once. In a run's folder,
`rank-N.json` says what the N-th process saw; `log-N` is all that it printed. `spoil` is the step, from 0, at which the
last process's loss is NaN, or the caption file that is written anew just before that process looks at the dataset.
`asked` is what it is asked for at which steps: see `ask`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch  # noqa: E402

import train_sd2x  # noqa: E402
from helpers.caching.images import ImageCache  # noqa: E402
from helpers.data import preparation  # noqa: E402
from helpers.data.collate import Batch  # noqa: E402
from helpers.models.adapters import trainable_parameters  # noqa: E402
from helpers.models.text import TextEncoder  # noqa: E402
from helpers.training import checkpoints, loop  # noqa: E402
from helpers.training.step import StepLoss  # noqa: E402


@dataclass
class Seen:
    """What a process did.

    Attributes:
        uses: by step, the images that count in its loss, each with its epoch's draw of a caption.
        weights: a hash of what it had trained in the end.
        generator: one of the random numbers' state.
    """

    code: int = 1
    uses: list[list[str]] = field(default_factory=list)
    decoded: int = 0
    encoded: int = 0
    saved: int = 0
    losses: list[float] = field(default_factory=list)
    weights: str = ""
    generator: str = ""


def watch(seen: Seen, spoil: int | str | None, asked: dict[str, str], is_last: bool) -> None:
    """Have the trainer write down what it does."""
    if isinstance(spoil, str) and is_last:
        scan = preparation.scan_backend
        preparation.scan_backend = lambda backend: Path(spoil).write_text("another caption", "utf-8") and scan(backend)
    computed, decode, encode = loop.training_loss, ImageCache._decode, TextEncoder.__call__
    trained, save, end_step = loop.train, checkpoints.save, loop.Progress.end_step

    def loss(parts: Any, unet: Any, batch: Batch, generator: torch.Generator) -> StepLoss:
        counts = batch.share is None or batch.share.weight > 0
        seen.uses.append([use.record.path.name for use in batch.uses] if counts else [])
        result = computed(parts, unet, batch, generator)
        ask(asked.get(str(len(seen.uses) - 1)) if is_last else None)
        is_spoilt = is_last and spoil == len(seen.uses) - 1
        return result._replace(loss=result.loss * float("nan")) if is_spoilt else result

    def count(name: str, function: Callable, number: Callable[..., int]) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            setattr(seen, name, getattr(seen, name) + number(*arguments))
            return function(*arguments, **named)

        return call

    def train(run: loop.Run, *arguments: Any) -> None:
        trained(run, *arguments)
        digest = sha256()
        for parameter in trainable_parameters(run.parts.denoiser):
            digest.update(parameter.detach().float().numpy().tobytes())
        seen.weights, seen.generator = digest.hexdigest(), sha256(run.generator.get_state().numpy()).hexdigest()

    def end(progress: loop.Progress, rate: float, losses: torch.Tensor, passes: Any) -> None:
        seen.losses.append(losses.mean().item())
        end_step(progress, rate, losses, passes)

    loop.training_loss, loop.train, loop.Progress.end_step = loss, train, end
    ImageCache._decode = count("decoded", decode, lambda cache, jobs, *rest: len(jobs))
    TextEncoder.__call__ = count("encoded", encode, lambda encoder, texts: len(texts))
    checkpoints.save = count("saved", save, lambda *_: 1)


def ask(what: str | None) -> None:
    """Ask a run for something: by the signal of this name, or by a file at this path."""
    if what and what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what:
        Path(what).touch()


def process(folder: Path, rank: int, port: int, run: dict[str, Any]) -> int:
    """A fork that is the `rank`-th process of a run; returns its process id."""
    count, flags = run["count"], run["flags"]
    pid = os.fork()
    if pid:
        return pid
    seen = Seen()
    try:
        with (folder / f"log-{rank}").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            if count > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in place.items()})
            watch(seen, run["spoil"], run["asked"], rank == count - 1)
            seen.code = train_sd2x.main(flags)
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        (folder / f"rank-{rank}.json").write_text(json.dumps(asdict(seen)))
        os._exit(seen.code)


def main(runs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for run in runs:
        folder = Path(run["folder"])
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = [process(folder, rank, port, run) for rank in range(run["count"])]
        for pid in pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
