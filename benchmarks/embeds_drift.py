"""What text embeds in 8 bits lose, and what that changes in what a model predicts. Prints and saves a JSON.

    python -m benchmarks.embeds_drift          # a minute on a CPU

embeds: how far off normal numbers come back, as wide as T5-XXL's, beside what bfloat16 itself rounds off; and the same
    with a few channels that are many times larger, as T5 has them.
demo: by how much the embeds of the demo's T5 change, and with them predictions and losses of its trained stage I,
    on its pictures with their captions, over all of the noise levels. T5-XXL itself takes its weights, of 19 GB.

Changes are relative: the norm of the difference by the norm of what there was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import T5EncoderModel

from benchmarks.machine import ROOT, write_result
from helpers.caching.storages import GROUP, dequantise, quantised
from helpers.models.text import T5, TextEncoder

MODEL = ROOT / "examples" / "demo" / "model"
PICTURES = ROOT / "examples" / "demo" / "images" / "known"
EDGE = 64
CPU = torch.device("cpu")

CAPTIONS, WIDTH = 16, 4096
OUTLIERS, LARGER = 8, 50
"""How many channels of so many are how many times larger."""


def in_8_bits(embeds: Tensor) -> Tensor:
    """bfloat16 embeds as they come back."""
    dequantise(quantised(embeds), out := torch.empty_like(embeds))
    return out


def change(new: Tensor, old: Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())


def normal_numbers(generator: torch.Generator) -> Tensor:
    return torch.randn(CAPTIONS, T5().length, WIDTH, generator=generator)


def outlying_channels(generator: torch.Generator) -> Tensor:
    """Which channels are larger, bool [WIDTH]."""
    chosen = torch.zeros(WIDTH, dtype=torch.bool)
    chosen[torch.randperm(WIDTH, generator=generator)[:OUTLIERS]] = True
    return chosen


def drift_of(embeds: Tensor) -> dict[str, float]:
    """The change that 8 bits make, and the one that bfloat16 makes of float32."""
    rounded = embeds.bfloat16()
    return {"int8": change(in_8_bits(rounded), rounded), "bf16": change(rounded, embeds)}


def drift_beside_outliers() -> dict[str, float]:
    """The same with some channels far larger; and the change of all other numbers, most of it in the same groups."""
    generator = torch.Generator().manual_seed(0)
    larger = outlying_channels(generator)
    embeds = normal_numbers(generator) * torch.where(larger, LARGER, 1)
    rounded = embeds.bfloat16()
    found = in_8_bits(rounded)
    grouped = larger.view(-1, GROUP).any(1).repeat_interleave(GROUP)
    return {
        **drift_of(embeds),
        "int8, the other channels": change(found[..., ~larger], rounded[..., ~larger]),
        "int8, those beside a larger one": change(found[..., grouped & ~larger], rounded[..., grouped & ~larger]),
        "share_of_groups_with_a_larger_one": float(grouped.float().mean()),
    }


class Demo:
    """The demo's stage I, pictures with their captions, and noise of all levels."""

    def __init__(self, pictures: int, levels: int) -> None:
        files = sorted(path for path in PICTURES.iterdir() if path.suffix != ".txt")[:pictures]
        self.captions = [T5().prepare(path.with_suffix(".txt").read_text("utf-8").splitlines()[0]) for path in files]
        self.x = torch.stack([_pixels(path) for path in files])
        self.noise = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(0))
        self.scheduler = DDPMScheduler.from_pretrained(MODEL / "scheduler")
        self.unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").eval()
        self.levels = [(2 * level + 1) * len(self.scheduler.timesteps) // (2 * levels) for level in range(levels)]

    @torch.inference_mode()
    def predict(self, embeds: Tensor) -> Tensor:
        """What the UNet says of the noise, `[levels, pictures, 3, H, W]`, in float32."""
        predicted = []
        for level in self.levels:
            t = torch.full((len(self.x),), level)
            x_t = self.scheduler.add_noise(self.x, self.noise, t)
            predicted.append(self.unet(x_t, t, encoder_hidden_states=embeds.float()).sample[:, :3])
        return torch.stack(predicted)

    def losses(self, predicted: Tensor) -> Tensor:
        """`[levels, pictures]`."""
        return (predicted - self.noise).square().mean((-3, -2, -1))

    @torch.inference_mode()
    def in_float32(self) -> Tensor:
        """The embeds, computed and kept in float32."""
        encoder = TextEncoder(T5EncoderModel, T5().length, MODEL, CPU, None, torch.float32, masks_padding=True)
        tokens = encoder.tokenizer(self.captions)
        return encoder.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state


def demo(pictures: int, levels: int) -> dict[str, object]:
    """What each way to have the embeds changes."""
    it = Demo(pictures, levels)
    encoder, whole = T5().load(MODEL, CPU), it.in_float32()
    exact = encoder(it.captions)
    larger = torch.ones(exact.shape[-1]).bfloat16()
    larger[0] = LARGER  # it has one group: so this is what an outlier in each group would do
    of_exact = {
        "int8": in_8_bits(exact),
        f"int8, a channel {LARGER} times larger in each group": in_8_bits(exact * larger) / larger,
        "no caption": encoder([""]).expand_as(exact),
    }
    of_whole = {"float32 rounded to bf16": whole.bfloat16(), "T5 computed in bf16 instead of float32": exact}
    changes = _changes(it, exact, of_exact) | _changes(it, whole, of_whole)
    return {"pictures": len(it.captions), "levels": levels, "width": exact.shape[-1], "changes": changes}


def _changes(it: Demo, old: Tensor, others: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    before = it.predict(old)
    loss_before, changes = it.losses(before), {}
    for name, new in others.items():
        predicted = it.predict(new)
        loss = it.losses(predicted)
        changes[name] = {
            "embeds": change(new, old),
            "prediction": change(predicted, before),
            "mean_loss": float(loss.mean() / loss_before.mean() - 1),
            "loss_of_a_picture": float((loss / loss_before - 1).square().mean().sqrt()),
        }
    return changes


def _pixels(path: Path) -> Tensor:
    """A picture as the UNet sees it: float32 `[3, H, W]` in [-1, 1]."""
    image = Image.open(path).convert("RGB").resize((EDGE, EDGE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _rounded(figures: object) -> object:
    if isinstance(figures, dict):
        return {name: _rounded(value) for name, value in figures.items()}
    return float(f"{figures:.3g}") if isinstance(figures, float) else figures


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--levels", type=int, default=10, help="noise levels, evenly over all of them")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "embeds_drift.json")
    options = parser.parse_args(argv)
    of_demo = demo(options.pictures, options.levels)
    result = {
        "embeds": {
            f"normal numbers, {WIDTH} wide": drift_of(normal_numbers(torch.Generator().manual_seed(0))),
            f"the same, {OUTLIERS} channels {LARGER} times larger": drift_beside_outliers(),
        },
        "demo": of_demo,
    }
    return write_result(options.output, _rounded(result))


if __name__ == "__main__":
    main()
