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
    prompts = [CAPTIONS[1].format(thing=thing) for thing in wanted]
    drawn = score.generate(pipeline, prompts, steps=15, guidance=guidance, seed=3)
    assert score.tally(known, drawn[: len(known)]).both >= 0.85
    assert score.tally(wanted[len(known) :], drawn[len(known) :]).both <= 0.2


def test_stage_ii_beats_bicubic_upscaling_on_pictures_that_it_never_saw():
    options = score_stage2.parse([str(DEMO / "stage2"), "--pictures=2"])
    model, bicubic = score_stage2.gain(score_stage2.load_pipeline(options.model), options)
    assert model - bicubic >= 1.5


@pytest.mark.parametrize("edge, pictures, least", [(64, 8, 0.8), (128, 2, 0.8)])
def test_stage_iii_beats_bicubic_upscaling_at_several_sizes(edge, pictures, least):
    options = score_stage2.parse([str(DEMO / "stage3"), f"--pictures={pictures}", f"--edge={edge}", "--steps=10"])
    model, bicubic = score_stage2.gain(score_stage2.load_pipeline(options.model), options)
    assert model - bicubic >= least


class Shuffled(NoisedLowRes):
    """Shows each image the low-resolution copy of another."""

    def __call__(self, x_t, reduced, schedule, draws):
        return super().__call__(x_t, lambda scale: reduced(scale).roll(1, 0), schedule, draws)


@pytest.mark.parametrize("stage, model", [("deepfloyd-ii", "stage2"), ("deepfloyd-iii", "stage3")])
def test_the_true_low_resolution_image_gives_a_lower_loss_than_a_shuffled_one(stage, model):
    """A model that is never shown it cannot tell them apart. Seen where there is little but noise in x_t."""
    noisy = LossSettings(trains_variance=False, timestep_bias=TimestepBias("later", multiplier=1e6, portion=0.5))
    parts = loading.load(SPECS[stage], DEMO / model, torch.float32, loss=noisy)
    rng = np.random.default_rng(5)
    drawn = np.stack([np.asarray(draw(thing, (64, 64), rng)) for thing in things("known", 16)])
    images, space = torch.from_numpy(drawn), parts.spec.space
    if space.component:
        images = space.cached_of(space.load(DEMO / model, torch.device("cpu")), images)
    batch = Batch(images, torch.zeros(16, 77, 64, dtype=torch.bfloat16), ())

    def loss(conditioning: NoisedLowRes) -> float:
        shown = replace(parts, spec=replace(parts.spec, conditioning=conditioning))
        with torch.no_grad():
            return training_loss(shown, parts.denoiser, batch, torch.Generator().manual_seed(0)).loss.item()

    conditioning = parts.spec.conditioning
    assert loss(conditioning) < 0.8 * loss(Shuffled(**vars(conditioning)))
