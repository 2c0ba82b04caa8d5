"""The run and its loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch.amp import GradScaler
from tqdm import tqdm

from helpers.data.collate import Batch
from helpers.data.sampler import Position
from helpers.files import is_full
from helpers.models.adapters import trainable_parameters
from helpers.models.parts import Parts
from helpers.processes import Processes
from helpers.training.ema import EMA
from helpers.training.nonfinite import Passed, all_finite, describe, gradient_norm, reports
from helpers.training.optimizers import restore_state, set_rate
from helpers.training.released import Released
from helpers.training.requests import Requests
from helpers.training.schedules import LearningRate
from helpers.training.step import training_loss
from helpers.training.utilisation import Utilisation

REPORT_SECONDS = 0.5
LEAST_SCALE = 1.0
"""Of the loss in float16: below it only gradients that are too large by themselves, above 65,504, are infinite."""


class NonFiniteLoss(Exception):
    """Loss, gradient or weights stay NaN or infinite: nothing is learned any more; the message says since when."""


@dataclass
class Run:
    """All that a training run is. What must survive a restart is in `state` and comes back by `restore`."""

    accelerator: Accelerator
    parts: Parts
    denoiser: torch.nn.Module  # that of `parts`, as accelerate prepared it
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    max_grad_norm: float
    generator: torch.Generator
    ema: EMA | None = None
    released: Released | None = None  # makes most updates in the backward pass
    max_nonfinite_steps: int = 5
    # Scales the loss where the forward pass is in float16. Not accelerate's, which would leave steps out by itself, and
    # is for GPUs alone.
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    processes: Processes = field(default_factory=Processes)
    step: int = 0
    position: Position = field(default_factory=lambda: Position(0, 0))
    skipped_in_a_row: int = 0  # the steps just done whose loss or gradient was not finite
    requests: Requests = field(default_factory=Requests)
    utilisation: Utilisation | None = None  # told in the progress line, where it is known

    @property
    def total_steps(self) -> int:
        return self.learning_rate.total_steps

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def autocast(self) -> AbstractContextManager[None]:
        """What the denoiser computes within, in training and in validation."""
        if self.scaler.is_enabled():
            return torch.autocast(self.accelerator.device.type, torch.float16)
        return self.accelerator.autocast()

    @property
    def computed(self) -> torch.dtype:
        """The dtype of the forward pass."""
        if self.scaler.is_enabled():
            return torch.float16
        return torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else self.parts.denoiser.dtype

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it the UNet has the averaged weights, where they are kept; afterwards its own, bit for bit."""
        return self.ema.in_place() if self.ema else nullcontext()

    def asked_to_stop(self) -> bool:
        """Whether any process is; all of them learn it here, and so must come here together."""
        stop = self.processes.highest(self.requests.stop or 0)
        if stop:  # else it stays what it is: a signal may have come while they agreed
            self.requests.stop = stop
        return bool(stop)

    def state(self) -> dict[str, Any]:
        """The same in all processes, which must come here together."""
        kind = self.accelerator.device.type
        return {
            "step": self.step,
            "position": tuple(self.position),
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self.scaler.state_dict(),  # empty where there is none
            "ema": self.ema.state() if self.ema else None,
            "device": kind,
            "generator": self.generator.get_state(),
            "rng": [tuple(map(_as_bytes, own)) for own in self.processes.gather(_dropout_state(kind))],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the trained weights of there already in the UNet.

        What cannot go on as it was is said: random numbers on another kind of device, and averaged weights that were
        not kept until now.
        """
        self.step = state["step"]
        self.position = Position(*state["position"])
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)  # checkpoints of before have none
        restore_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state.get("loss_scale", {}))
        self.restore_average(state.get("ema"))
        kind, rank, fresh = self.accelerator.device.type, self.processes.rank, self.generator.initial_seed() + self.step
        if state["device"] != kind:
            print(f"The checkpoint is from a {state['device']} device: from here on other random numbers are drawn.")
            self.generator.manual_seed(fresh)
            return
        self.generator.set_state(state["generator"])
        if rank < len(state["rng"]):
            for source, own in zip(_dropout_sources(kind), state["rng"][rank]):
                source.set_rng_state(own)
        else:  # fewer processes made it
            torch.manual_seed(fresh + rank)

    def restore_average(self, state: dict[str, Any] | None) -> None:
        """Take the averaged weights of `state()["ema"]`; where it has none, they begin at the trained ones."""
        if self.ema and state:
            self.ema.restore(state)
        elif self.ema:
            self.ema.restart()
            print("USE_EMA (--use_ema): the checkpoint has no averaged weights; they begin at its trained ones.")
        elif state:
            print("USE_EMA (--use_ema) is off: the averaged weights of the checkpoint are dropped.")


def _dropout_sources(kind: str) -> list[ModuleType]:
    """Where the random numbers of dropout come from, on a device of this kind."""
    return [torch] if kind == "cpu" else [torch, getattr(torch, kind)]


def _dropout_state(kind: str) -> list[list[int]]:
    return [source.get_rng_state().tolist() for source in _dropout_sources(kind)]


def _as_bytes(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


def train(
    run: Run, batches: Iterator[tuple[Position, Batch]], after_step: Sequence[Callable[[Run], None]] = ()
) -> None:
    """Train until the last step, or until it is asked to stop.

    A step whose loss or gradient is not finite changes nothing but the random numbers drawn, and counts as a step; with
    `released`, weights whose gradients came before the one that is not are updated, and stay so.
    Where it is the loss scale that makes the gradient of a finite loss infinite, the scale falls: nothing is broken.

    Args:
        batches: endless, from the run's position on, each with the position after it.
        after_step: called in turn after each step.

    Raises:
        NonFiniteLoss: after more than `max_nonfinite_steps` such steps in a row.
    """
    parameters = trainable_parameters(run.denoiser)
    run.denoiser.train()  # diffusers loads in eval mode, in which neither dropout nor gradient checkpointing acts
    with Progress(run) as progress:
        while not run.finished and not run.asked_to_stop():
            rate = run.learning_rate.at(run.step)
            set_rate(run.optimizer, rate)
            passes = []
            for _ in range(run.accelerator.gradient_accumulation_steps):
                position, batch = next(batches)
                run.processes.pulse.reached += 1
                passes.append(_passed(run, batch.to(run.accelerator.device)))
            run.scaler.unscale_(run.optimizer)
            norm, losses = _clipped(run, parameters), _losses(run, passes)
            if all_finite(losses, norm):
                run.optimizer.step()
                run.scaler.update()
                if run.ema:
                    run.ema.update()
                run.skipped_in_a_row = 0
            elif not _scale_falls(run, losses):
                _skip(run, passes, losses, norm, parameters[0].dtype)
            run.optimizer.zero_grad()
            run.position, run.step = position, run.step + 1
            progress.end_step(rate, losses, passes)
            for call in after_step:
                call(run)


def _passed(run: Run, batch: Batch) -> Passed:
    """Add the gradient of a batch, which is on the device."""
    with run.accelerator.accumulate(run.denoiser):
        with run.autocast():
            loss, timesteps = training_loss(run.parts, run.denoiser, batch, run.generator)
        if batch.share:
            loss = loss * batch.share.weight
        if run.released:
            run.released.begin(loss)
        run.accelerator.backward(run.scaler.scale(loss))
    images = batch.share.total if batch.share else len(batch.uses)
    text = batch.prompt_embeds.flatten(1).sum(1, dtype=torch.float32)
    return Passed(batch.uses, images, loss.detach(), timesteps, text)


def _losses(run: Run, passes: Sequence[Passed]) -> torch.Tensor:
    """The loss of each pass, over the images of all processes."""
    own = torch.stack([one.loss for one in passes])
    return own if run.processes.count == 1 else run.accelerator.reduce(own, "mean")


def _clipped(run: Run, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Clip the gradient; a norm of it from before, which is finite where all of it is."""
    if run.released:
        return run.released.norm()
    if run.max_grad_norm:
        return run.accelerator.clip_grad_norm_(parameters, run.max_grad_norm)
    return gradient_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _scale_falls(run: Run, losses: torch.Tensor) -> bool:
    """Halve the loss scale if it is to blame for a gradient that is not finite; it is the same in all processes."""
    scale = run.scaler.get_scale()  # 1 where the loss is not scaled
    to_blame = scale > LEAST_SCALE and bool(losses.isfinite().all())
    run.scaler.update(None if to_blame else scale)
    fallen = run.scaler.get_scale()
    if fallen < scale and run.processes.is_first:
        words = f"gradients overflow float16 at a loss scale of {scale:,.0f}, which becomes {fallen:,.0f}"
        tqdm.write(f"Step {run.step + 1} finds the loss scale and trains nothing: {words}.", file=sys.stderr)
    return fallen < scale


def _skip(
    run: Run, passes: Sequence[Passed], losses: torch.Tensor, norm: torch.Tensor, trained: torch.dtype
) -> None:
    """Tell of a step that cannot be made, and end the run where there were too many in a row."""
    require_finite(run)  # else it is no image's fault
    run.skipped_in_a_row += 1
    told = [one for process in run.processes.gather(reports(passes)) for one in process]
    what, step = describe(losses, norm, told, run.computed, trained), run.step + 1
    if run.skipped_in_a_row > run.max_nonfinite_steps:
        limit = f"{run.max_nonfinite_steps} such steps in a row (MAX_NONFINITE_STEPS, --max_nonfinite_steps) may be"
        wider = " float16 ends at 65,504: in a new run MIXED_PRECISION=bf16 or no (--mixed_precision) does not."
        wider = wider if run.computed == torch.float16 else ""
        raise NonFiniteLoss(_broken(f"Step {step}: {what}\nNo more than {limit} skipped") + wider)
    if run.processes.is_first:
        words = f"Step {step} is skipped, {run.skipped_in_a_row} in a row{_but_for_released(run)}: {what}"
        tqdm.write(words, file=sys.stderr)


def _but_for_released(run: Run) -> str:
    if not (run.released and run.released.updated):
        return ""
    some = f"{run.released.updated:,} of {run.released.count:,} tensors"
    return f", but for {some} that were updated before that was seen (OPTIMIZER_RELEASE_GRADIENTS)"


def require_finite(run: Run) -> None:
    """Raise NonFiniteLoss if a trained weight is NaN or infinite, so that such weights are never saved."""
    if not all(torch.isfinite(parameter).all() for parameter in trainable_parameters(run.denoiser)):
        raise NonFiniteLoss(_broken(f"Weights are NaN or infinite at step {run.step}"))


def _broken(what: str) -> str:
    return (
        f"{what}, so training ends; what was saved before is intact. Lower LEARNING_RATE (--learning_rate), keep"
        " MAX_GRAD_NORM (--max_grad_norm) at 1, and go on from a checkpoint of before (RESUME_CHECKPOINT,"
        " --resume_from_checkpoint). Where it is always the same image, take that out."
    )


@contextmanager
def curves(run: Run) -> Iterator[None]:
    """Within it a full disk ends the trackers, and not the run."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        run.accelerator.trackers.clear()
        tqdm.write(f"No space is left for curves, which end here at step {run.step:,}. Training goes on.")


def close_curves(run: Run) -> None:
    # Not accelerate's `end_training`, which parts the processes too.
    with curves(run):
        for tracker in run.accelerator.trackers:
            tracker.finish()


@dataclass(frozen=True)
class Every:
    """Do something each `steps` steps (0: never in between), and after the last one."""

    steps: int
    action: Callable[[Run], None]

    def __call__(self, run: Run) -> None:
        if self.is_due(run):
            self.action(run)

    def is_due(self, run: Run) -> bool:
        return run.finished or bool(self.steps and run.step % self.steps == 0)


class Progress:
    """The progress bar and the trackers' curves.

    Losses stay on the device until the bar is next drawn, since reading one waits for the GPU.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.bar = tqdm(total=run.total_steps, initial=run.step, unit="step", desc="Training", dynamic_ncols=True)
        self.waiting: list[tuple[int, float, torch.Tensor]] = []
        self.samples = self.operations = 0
        self.drawn = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None or issubclass(kind, NonFiniteLoss):  # after any other error the device may not answer
                self.draw()
        finally:
            self.bar.close()

    def end_step(self, rate: float, losses: torch.Tensor, passes: Sequence[Passed]) -> None:
        """Note a step. One that was skipped has no place on a curve."""
        if not self.run.skipped_in_a_row:
            self.waiting.append((self.run.step, rate, losses.mean()))
            self.samples += sum(one.images for one in passes)
            if self.run.utilisation:
                self.operations += self.run.utilisation.operations(passes)
        if time.monotonic() - self.drawn >= REPORT_SECONDS or self.run.finished:
            self.draw()

    def draw(self) -> None:
        if not self.waiting:
            return
        seconds = max(time.monotonic() - self.drawn, 1e-9)
        waiting, self.waiting = self.waiting, []
        losses = torch.stack([loss for _, _, loss in waiting]).tolist()
        with curves(self.run):
            for (step, rate, _), loss in zip(waiting, losses):
                self.run.accelerator.log({"train/loss": loss, "train/learning_rate": rate}, step=step)
        words = [f"loss {losses[-1]:.4f}", f"lr {rate:.2e}", f"{self.samples / seconds:.1f} samples/s"]
        if self.run.utilisation:
            words.append(f"MFU {self.run.utilisation.share(self.operations, seconds):.0%}")
        self.bar.set_postfix_str(", ".join(words), False)
        self.bar.update(waiting[-1][0] - self.bar.n)
        self.samples, self.operations, self.drawn = 0, 0, time.monotonic()
