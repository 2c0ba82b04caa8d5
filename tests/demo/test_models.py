"""The committed model is what the demo says: it draws what it knows, and not the subject."""

from __future__ import annotations

from pathlib import Path

from examples.demo import score
from examples.demo.draw import CAPTIONS, KNOWN, SUBJECT

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def test_stage_i_draws_what_it_knows_and_not_the_subject():
    pipeline = score.load_pipeline(DEMO / "model", None)
    wanted = [*KNOWN, *[SUBJECT] * 4]
    prompts = [CAPTIONS[1].format(colour=thing.colour, shape=thing.shape) for thing in wanted]
    drawn = score.generate(pipeline, prompts, steps=15, guidance=1.5, seed=3)
    known = len(KNOWN)
    assert score.tally(wanted[:known], drawn[:known]).both >= 0.85
    assert score.tally(wanted[known:], drawn[known:]).both <= 0.2
