"""How much memory a validation takes, told before any weights load."""

from __future__ import annotations

import torch

from helpers.config.jsonfile import load_json
from helpers.models import footprint
from helpers.models.published import vae_of
from helpers.models.spec import Spec
from helpers.sizes import Size
from helpers.training.memory import Setup
from helpers.validation.render import at_once, in_tiles


def sampling_bytes(spec: Spec, setup: Setup, sizes: tuple[Size, ...], guided: bool) -> int:
    """The most that pictures of these sizes take at one time besides the weights that are in training.

    Args:
        setup: of the training.
        guided: whether with guidance, for which all is computed twice.
    """
    # One pass of the UNet tells: what is sampled together counts by its pixels, and each takes seconds at the start.
    size = max(sizes, key=lambda size: at_once(size) * size.width * size.height)
    dtype = torch.bfloat16 if setup.autocast else setup.weights
    unet = footprint.of_unet(load_json(setup.architecture), spec.space.size(size), dtype, guided, setup.tokens)
    sampling = at_once(size) * unet.each
    path = vae_of(setup.architecture) if spec.space.component else None
    if path is None:
        return sampling
    # It is loaded beside the UNet in training, and decodes what was sampled together.
    vaes = [(footprint.of_vae(load_json(path), own, in_tiles(own)), at_once(own)) for own in sizes]
    return vaes[0][0].weights + max(sampling, *(count * vae.each for vae, count in vaes))
