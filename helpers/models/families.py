"""The rows: one for each family that can be trained, by the key of its `config.families.Family`."""

from __future__ import annotations

from helpers.config.families import DEEPFLOYD_I, DEEPFLOYD_II, DEEPFLOYD_III, STABLE_DIFFUSION
from helpers.models.conditioning import NoisedLowRes, TextOnly
from helpers.models.spaces import Latents, Pixels
from helpers.models.spec import Spec
from helpers.models.text import CLIP, T5

SPECS = {
    DEEPFLOYD_I.key: Spec(space=Pixels(), text=T5(), conditioning=TextOnly(), pipeline="IFPipeline"),
    DEEPFLOYD_II.key: Spec(
        space=Pixels(), text=T5(), conditioning=NoisedLowRes(), pipeline="IFSuperResolutionPipeline"
    ),
    DEEPFLOYD_III.key: Spec(
        space=Latents(factor=4, scaling_factor=0.08333, with_image=True, vae_bytes=221_300_000),
        text=CLIP(published="one takes 1.4 GB"),
        conditioning=NoisedLowRes(scheduler="low_res_scheduler", levels=350, embeds_level=True),
        pipeline="StableDiffusionUpscalePipeline",
    ),
    STABLE_DIFFUSION.key: Spec(
        space=Latents(),
        text=CLIP(),
        conditioning=TextOnly(),
        pipeline="StableDiffusionPipeline",
        controlnet_pipeline="StableDiffusionControlNetPipeline",
    ),
}
