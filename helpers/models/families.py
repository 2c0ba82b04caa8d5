"""The rows: one for each family that can be trained, by the key of its `config.families.Family`."""

from __future__ import annotations

from helpers.config.families import DEEPFLOYD_I
from helpers.models.conditioning import TextOnly
from helpers.models.spaces import Pixels
from helpers.models.spec import Spec
from helpers.models.text import T5

SPECS = {
    DEEPFLOYD_I.key: Spec(space=Pixels(), text=T5(), conditioning=TextOnly(), pipeline="IFPipeline"),
}
