"""The rows: one for each family that can be trained, by the key of its `config.families.Family`."""

from __future__ import annotations

from helpers.config.families import DEEPFLOYD_I, DEEPFLOYD_II
from helpers.models.conditioning import NoisedLowRes, TextOnly
from helpers.models.spaces import Pixels
from helpers.models.spec import Spec
from helpers.models.text import T5

SPECS = {
    DEEPFLOYD_I.key: Spec(space=Pixels(), text=T5(), conditioning=TextOnly(), pipeline="IFPipeline"),
    DEEPFLOYD_II.key: Spec(
        space=Pixels(), text=T5(), conditioning=NoisedLowRes(), pipeline="IFSuperResolutionPipeline"
    ),
}
