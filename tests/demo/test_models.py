"""The committed models are what the demo says: one draws what it knows and not the subject, one adds what was lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.demo import score, score_stage2
from examples.demo.draw import CAPTIONS, KNOWN, SUBJECT, draw, things
from helpers.data.collate import Batch
from helpers.diffusion.timesteps import TimestepBias
from helpers.models import loading
from helpers.models.conditioning import NoisedLowRes
from helpers.models.families import SPECS
from helpers.models.parts import LossSettings
from helpers.training.step import training_loss

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


@pytest.mark.parametrize("model, guidance, each", [("model", 1.5, 1), ("sd", 3.0, 2)])
def test_a_base_draws_what_it_knows_and_not_the_subject(model, guidance, each):
    pipeline, known = score.load_pipeline(DEMO / model, None), KNOWN[::each]
    wanted = [*known, *[SUBJECT] * 4]
    prompts = [CAPTIONS[1].format(colour=thing.colour, shape=thing.shape) for thing in wanted]
    drawn = score.generate(pipeline, prompts, steps=15, guidance=guidance, seed=3)
    assert score.tally(known, drawn[: len(known)]).both >= 0.85
    assert score.tally(wanted[len(known) :], drawn[len(known) :]).both <= 0.2


def test_stage_ii_beats_bicubic_upscaling_on_pictures_that_it_never_saw():
    options = score_stage2.parse([str(DEMO / "stage2"), "--pictures=2"])
    model, bicubic = score_stage2.gain(score_stage2.load_pipeline(options.model), options)
    assert options.noise_level == 250
    assert model - bicubic >= 1.5


class Shuffled(NoisedLowRes):
    """Shows each image the low-resolution copy of another."""

    def __call__(self, x_t, images, schedule, generator):
        return super().__call__(x_t, images.roll(1, 0), schedule, generator)


def test_the_true_low_resolution_image_gives_a_lower_loss_than_a_shuffled_one():
    """A stage II that is never shown it cannot tell them apart. Seen where there is little but noise in x_t."""
    noisy = LossSettings(trains_variance=False, timestep_bias=TimestepBias("later", multiplier=1e6, portion=0.5))
    parts = loading.load(SPECS["deepfloyd-ii"], DEMO / "stage2", torch.float32, loss=noisy)
    rng = np.random.default_rng(5)
    pictures = np.stack([np.asarray(draw(thing, (64, 64), rng)) for thing in things("known", 16)])
    batch = Batch(torch.from_numpy(pictures), torch.zeros(16, 77, 64, dtype=torch.bfloat16), ())

    def loss(conditioning: NoisedLowRes) -> float:
        shown = replace(parts, spec=replace(parts.spec, conditioning=conditioning))
        with torch.no_grad():
            return training_loss(shown, parts.denoiser, batch, torch.Generator().manual_seed(0)).loss.item()

    assert loss(NoisedLowRes()) < 0.8 * loss(Shuffled())
