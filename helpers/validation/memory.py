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
    unet = load_json(setup.architecture)
    dtype = torch.bfloat16 if setup.autocast else setup.weights
    path = vae_of(setup.architecture) if spec.space.component else None
    most = 0
    for size in sizes:
        sampling = at_once(size) * footprint.of_unet(unet, spec.space.size(size), dtype, guided, setup.tokens).each
        # It is loaded beside the UNet in training, and decodes what was sampled together.
        vae = footprint.of_vae(load_json(path), size, in_tiles(size)) if path else footprint.Footprint(0, 0, 0)
        most = max(most, vae.weights + max(sampling, at_once(size) * vae.each))
    return most
