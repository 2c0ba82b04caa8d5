"""Where latents are cached, each comes with its own image's crop and caption, whatever the epoch and the bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.caching.embeds import EmbedCache
from helpers.caching.latents import LatentCache
from helpers.data.collate import CachedMoments, Collator, Source
from helpers.data.dataset import MOST_CROPS, Dataset, plan_images
from helpers.data.sampler import Sampler
from helpers.data.scan import Captions, scan
from helpers.images.geometry import Rules
from helpers.images.loading import load

GEOMETRIES = {
    "square": {"maximum_image_size": 160, "target_downsample_size": 100},
    "own aspect": {"crop_aspect": "preserve"},
    "drawn aspects": {"crop_aspect": "random", "crop_aspect_buckets": ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0))},
    "centre": {"crop_style": "center", "maximum_image_size": 160, "target_downsample_size": 100},
    "area": {"crop": False, "resolution": 0.006, "resolution_type": "area"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine images of three aspects, each with its number as its caption."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(9):
        size = ((300, 200), (200, 300), (240, 240))[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(noise).resize(size).save(folder / f"image_{number}.png")
    return folder


def planned(folder: Path, tmp_path: Path, repeats: int = 0, **rules: object) -> Dataset:
    found = scan("set", folder, tmp_path / "index", Captions("filename"))
    rules = {"resolution": 64, "alignment": 32, **rules}
    return plan_images("set", folder, Rules(**rules, crops_once=True), found, repeats)


def pooled(images: torch.Tensor) -> torch.Tensor:
    """Stands in for a VAE, exactly: the crop's colours over 8 px, twice."""
    mean = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).double(), 8).half()
    return torch.cat([mean, mean], dim=1)


def numbers(texts: Sequence[str]) -> torch.Tensor:
    """Stands in for a text encoder: 0 for the empty caption, else one more than the number of its image."""
    return torch.stack([torch.full((2, 3), float(int(text[-1]) + 1 if text else 0)) for text in texts]).bfloat16()


@pytest.fixture
def collator(folder, tmp_path) -> Callable[[Dataset], Collator]:
    def collator(dataset: Dataset) -> Collator:
        latents = LatentCache(tmp_path / "latents", {"vae": "test"})
        assert latents.encode(dataset.latent_jobs("stepwise"), pooled, 4) == {}
        embeds = EmbedCache(tmp_path / "text", {"text_encoder": "test"})
        texts = ["", *dataset.captions()]
        embeds.build(texts, numbers, len, 4)
        source = Source(CachedMoments(latents, "stepwise"), embeds)
        return Collator({"set": source}, {text: text for text in texts})

    return collator


@pytest.mark.parametrize("rules", GEOMETRIES.values(), ids=GEOMETRIES)
def test_each_latent_is_that_of_its_crop_and_has_its_images_caption(folder, tmp_path, collator, rules):
    dataset = planned(folder, tmp_path, repeats=1, **rules)
    collate = collator(dataset)
    batches = Sampler([dataset], 2, 42, 0.2).batches()
    seen = 0
    while seen < 36:  # two epochs
        _, plan = next(batches)
        batch = collate(plan)
        assert batch.images.shape == (len(plan.uses), 6, plan.target.height // 8, plan.target.width // 8)
        for moments, text, use in zip(batch.images, batch.prompt_embeds, plan.uses):
            left, top, right, bottom = use.box
            assert (right - left, bottom - top) == plan.target
            crop = load(use.record.path, use.plan.intermediate, "stepwise")[top:bottom, left:right]
            assert torch.equal(moments, pooled(torch.from_numpy(crop.copy())[None])[0])
            number = 0 if use.dropped else int(use.record.path.stem[-1]) + 1
            assert text.unique().tolist() == [number]
            seen += 1


@pytest.mark.parametrize("repeats, crops", [(0, 1), (2, 3), (20, MOST_CROPS)])
def test_an_image_keeps_its_crops_in_all_epochs_whatever_the_seed(folder, tmp_path, repeats, crops):
    dataset = planned(folder, tmp_path, repeats, **GEOMETRIES["square"])
    boxes: dict[Path, set] = {}
    for seed in (1, 2):
        batches = Sampler([dataset], 4, seed, 0.0).batches()
        for _ in range(2 * Sampler([dataset], 4, seed, 0.0).batches_in_epoch(0)):
            for use in next(batches)[1].uses:
                boxes.setdefault(use.record.path, set()).add(use.box)
    assert len(boxes) == 9 and all(len(own) == crops for own in boxes.values())
    assert len({box for own in boxes.values() for box in own}) > 5
    cached = {(job.path, job.box) for job in dataset.latent_jobs("stepwise")}
    assert cached == {(path, box) for path, own in boxes.items() for box in own}


def test_crops_of_pixels_stay_drawn_anew(folder, tmp_path):
    found = scan("set", folder, tmp_path / "index", Captions("filename"))
    dataset = plan_images("set", folder, Rules(64, **GEOMETRIES["square"]), found)
    sampler = Sampler([dataset], 4, 1, 0.0)
    batches = sampler.batches()
    boxes: dict[Path, set] = {}
    for _ in range(3 * sampler.batches_in_epoch(0)):
        for use in next(batches)[1].uses:
            boxes.setdefault(use.record.path, set()).add(use.box)
    assert all(len(own) > 1 for own in boxes.values())
