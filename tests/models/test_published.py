import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from helpers.config.families import DEEPFLOYD_III, MODEL_TYPES
from helpers.models.families import SPECS
from helpers.models.published import architecture, text_encoder_of

PARAMETERS = {
    "i-medium-400m": 372e6,
    "i-large-900m": 938e6,
    "i-xlarge-4.3b": 4305e6,
    "ii-medium-450m": 461e6,
    "ii-large-1.2b": 1243e6,
    "iii-x4": 473e6,
    **dict.fromkeys(["1.4", "1.5"], 860e6),
    **dict.fromkeys(["2.0-base", "2.0", "2.1-base", "2.1"], 866e6),
}


@pytest.mark.parametrize("flavour", sorted({name for family, _ in MODEL_TYPES.values() for name in family.flavours}))
def test_the_architecture_of_every_flavour_is_known_without_a_download(flavour):
    family = next(family for family, _ in MODEL_TYPES.values() if flavour in family.flavours)
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(architecture(family.flavours[flavour]))
        unet = UNet2DConditionModel.from_config(config)
    assert unet.config.in_channels == SPECS[family.key].in_channels
    edge = unet.config.sample_size * (family.pixels_per_latent or 1)
    assert edge == family.native_edge(flavour, family.flavours[flavour])
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(PARAMETERS[flavour], rel=0.005)


def test_the_upscalers_text_encoder_is_that_which_its_unet_reads():
    [hub_id] = DEEPFLOYD_III.flavours.values()
    unet = architecture(hub_id)
    read, given = (json.loads(path.read_text("utf-8")) for path in (unet, text_encoder_of(unet)))
    assert read["cross_attention_dim"] == given["hidden_size"] == 1024


@pytest.mark.parametrize("name", ["someone/IF-I-M-v1.0", "DeepFloyd/IF-III-L-v1.0", "stage1", ""])
def test_other_models_are_not_taken_for_published_ones(name):
    assert architecture(name) is None
