"""The run and its loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from helpers.data.collate import Batch
from helpers.data.sampler import Position
from helpers.models.adapters import trainable_parameters
from helpers.models.parts import Parts
from helpers.training.ema import EMA
from helpers.training.schedules import LearningRate
from helpers.training.step import training_loss

REPORT_SECONDS = 0.5


class NonFiniteLoss(Exception):
    """The loss or a weight is NaN or infinite: nothing can be learned any more; the message says at which step."""


@dataclass
class Run:
    """All that a training run is. What must survive a restart is in `state` and comes back by `restore`."""

    accelerator: Accelerator
    parts: Parts
    unet: torch.nn.Module  # the UNet of `parts`, as accelerate prepared it
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    max_grad_norm: float
    generator: torch.Generator
    ema: EMA | None = None
    step: int = 0
    position: Position = field(default_factory=lambda: Position(0, 0))
    stop_signal: int | None = None  # set by a signal handler; the loop ends after the step in progress

    @property
    def total_steps(self) -> int:
        return self.learning_rate.total_steps

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it the UNet has the averaged weights, where they are kept; afterwards its own, bit for bit."""
        return self.ema.in_place() if self.ema else nullcontext()

    def state(self) -> dict[str, Any]:
        kind = self.accelerator.device.type
        return {
            "step": self.step,
            "position": tuple(self.position),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state() if self.ema else None,
            "device": kind,
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "device_rng": None if kind == "cpu" else getattr(torch, kind).get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the trained weights of there already in the UNet.

        What cannot go on as it was is said: random numbers on another kind of device, and averaged weights that were
        not kept until now.
        """
        self.step = state["step"]
        self.position = Position(*state["position"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._restore_ema(state.get("ema"))
        kind = self.accelerator.device.type
        if state["device"] != kind:
            print(f"The checkpoint is from a {state['device']} device: from here on other random numbers are drawn.")
            self.generator.manual_seed(self.generator.initial_seed() + self.step)
            return
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if state["device_rng"] is not None:
            getattr(torch, kind).set_rng_state(state["device_rng"])

    def _restore_ema(self, state: dict[str, Any] | None) -> None:
        if self.ema and state:
            self.ema.restore(state)
        elif self.ema:
            self.ema.restart()
            print("USE_EMA (--use_ema): the checkpoint has no averaged weights; they begin at its trained ones.")
        elif state:
            print("USE_EMA (--use_ema) is off: the averaged weights of the checkpoint are dropped.")


def train(
    run: Run, batches: Iterator[tuple[Position, Batch]], after_step: Sequence[Callable[[Run], None]] = ()
) -> None:
    """Train until the last step, or until a signal asks to stop.

    Args:
        batches: endless, from the run's position on, each with the position after it.
        after_step: called in turn after each optimizer step.
    """
    parameters = trainable_parameters(run.unet)
    run.unet.train()  # diffusers loads in eval mode, in which neither dropout nor gradient checkpointing acts
    with Progress(run) as progress:
        while not run.finished and run.stop_signal is None:
            rate = run.learning_rate.at(run.step)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            for _ in range(run.accelerator.gradient_accumulation_steps):
                position, batch = next(batches)
                batch = batch.to(run.accelerator.device)
                with run.accelerator.accumulate(run.unet):
                    with run.accelerator.autocast():
                        loss = training_loss(run.parts, run.unet, batch, run.generator)
                    run.accelerator.backward(loss)
                    if run.accelerator.sync_gradients and run.max_grad_norm:
                        run.accelerator.clip_grad_norm_(parameters, run.max_grad_norm)
                    run.optimizer.step()
                    run.optimizer.zero_grad()
                progress.add(loss, len(batch.uses))
            if run.ema:
                run.ema.update()
            run.position, run.step = position, run.step + 1
            progress.end_step(rate)
            for call in after_step:
                call(run)


def require_finite(run: Run) -> None:
    """Raise NonFiniteLoss if a trained weight is NaN or infinite, so that such weights are never saved."""
    if not all(torch.isfinite(parameter).all() for parameter in trainable_parameters(run.unet)):
        raise NonFiniteLoss(_broken(f"Weights are NaN or infinite at step {run.step}"))


def _broken(what: str) -> str:
    return (
        f"{what}, so training ends; what was saved before is intact. Lower LEARNING_RATE (--learning_rate), keep"
        " MAX_GRAD_NORM (--max_grad_norm) at 1, and go on from the last checkpoint."
    )


@dataclass(frozen=True)
class Every:
    """Do something each `steps` steps (0: never in between), and after the last one."""

    steps: int
    action: Callable[[Run], None]

    def __call__(self, run: Run) -> None:
        if run.finished or (self.steps and run.step % self.steps == 0):
            self.action(run)


class Progress:
    """The progress bar and the trackers' curves.

    Losses stay on the device until the bar is next drawn, since reading one waits for the GPU.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.bar = tqdm(total=run.total_steps, initial=run.step, unit="step", desc="Training", dynamic_ncols=True)
        self.losses: list[torch.Tensor] = []
        self.waiting: list[tuple[int, float, torch.Tensor]] = []
        self.samples = 0
        self.drawn = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None or issubclass(kind, NonFiniteLoss):  # after any other error the device may not answer
                self.draw()
        finally:
            self.bar.close()

    def add(self, loss: torch.Tensor, samples: int) -> None:
        self.losses.append(loss.detach())
        self.samples += samples

    def end_step(self, rate: float) -> None:
        self.waiting.append((self.run.step, rate, torch.stack(self.losses).mean()))
        self.losses.clear()
        if time.monotonic() - self.drawn >= REPORT_SECONDS or self.run.finished:
            self.draw()

    def draw(self) -> None:
        if not self.waiting:
            return
        seconds = max(time.monotonic() - self.drawn, 1e-9)
        waiting, self.waiting = self.waiting, []
        losses = torch.stack([loss for _, _, loss in waiting]).tolist()
        for (step, rate, _), loss in zip(waiting, losses):
            if not math.isfinite(loss):
                raise NonFiniteLoss(_broken(f"The loss is {loss} at step {step}"))
            self.run.accelerator.log({"train/loss": loss, "train/learning_rate": rate}, step=step)
        self.bar.set_postfix_str(f"loss {losses[-1]:.4f}, lr {rate:.2e}, {self.samples / seconds:.1f} samples/s", False)
        self.bar.update(len(waiting))
        self.samples, self.drawn = 0, time.monotonic()
