"""What a VAE makes of each crop is encoded once, in batches of one size, and is that of no other crop or VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.caching.latents import LatentCache, LatentJob, NonFiniteLatent
from helpers.images.loading import load
from helpers.sizes import Size

FINGERPRINT = {"vae": "one"}
BOXES = {Size(40, 30): [(0, 0, 24, 24), (16, 6, 40, 30)], Size(48, 32): [(0, 0, 48, 32), (0, 8, 24, 32)]}


def job(path: Path, size: Size, box: tuple[int, int, int, int]) -> LatentJob:
    return LatentJob(path, hashlib.sha256(path.read_bytes()).hexdigest(), size, "stepwise", box)


@pytest.fixture
def jobs(tmp_path) -> list[LatentJob]:
    """Four crops of each of five images, of three sizes, mixed."""
    made = []
    for seed in range(5):
        path = tmp_path / f"{seed}.png"
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)).save(path)
        made += [job(path, size, box) for size, boxes in BOXES.items() for box in boxes]
    return made


class Encoder:
    """Stands in for a VAE: twice the channels' means over 8 px, so that a row tells which crop it is of."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(images.shape))
        mean = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 8)
        return torch.cat([mean, mean * 2], dim=1).half()


def crop(one: LatentJob) -> torch.Tensor:
    left, top, right, bottom = one.box
    return torch.from_numpy(load(one.path, one.size, one.method)[None, top:bottom, left:right].copy())


def read(cache: LatentCache, jobs: Sequence[LatentJob]) -> list[torch.Tensor]:
    outs = [torch.empty(1, *cache.store.shape(one.key), dtype=torch.float16) for one in jobs]
    for one, out in zip(jobs, outs):
        cache.read([one.key], out)
    return outs


def test_each_crop_has_its_own_moments(tmp_path, jobs):
    encode = Encoder()
    assert LatentCache(tmp_path / "cache", FINGERPRINT).encode(jobs, encode, 3) == {}
    assert sum(shape[0] for shape in encode.batches) == len(jobs)
    assert all(shape[0] <= 3 for shape in encode.batches) and len(encode.batches) < len(jobs)
    areas = [shape[1] * shape[2] for shape in encode.batches]
    assert areas == sorted(areas, reverse=True), "a VAE that does not fit must fail at once"
    again = LatentCache(tmp_path / "cache", FINGERPRINT)
    for one, moments in zip(jobs, read(again, jobs)):
        assert torch.equal(moments, Encoder()(crop(one)))


def test_nothing_is_encoded_twice_but_for_another_vae(tmp_path, jobs):
    LatentCache(tmp_path / "cache", FINGERPRINT).encode(jobs, Encoder(), 4)
    encode = Encoder()
    LatentCache(tmp_path / "cache", FINGERPRINT).encode(jobs, encode, 4)
    assert encode.batches == []
    other = LatentCache(tmp_path / "cache", {"vae": "two"})
    other.encode(jobs[:3], encode, 4)
    assert sum(shape[0] for shape in encode.batches) == 3 and len(other.store) == 3


def test_a_copy_under_another_name_is_not_encoded_again_and_another_crop_is(tmp_path, jobs):
    cache, encode = LatentCache(tmp_path / "cache", FINGERPRINT), Encoder()
    cache.encode(jobs, Encoder(), 4)
    copy = tmp_path / "copy.png"
    copy.write_bytes(jobs[0].path.read_bytes())
    moved = job(copy, jobs[0].size, (8, 0, 32, 24))
    cache.encode([job(copy, one.size, one.box) for one in jobs[:4]] + [moved], encode, 4)
    assert encode.batches == [(1, 24, 24, 3)] and moved.key in cache.store


def test_an_interrupted_build_keeps_what_was_encoded(tmp_path, jobs):
    class Stopped(Exception):
        pass

    def stops(images: torch.Tensor) -> torch.Tensor:
        if len(encode.batches) == 3:
            raise Stopped
        return encode(images)

    encode = Encoder()
    with pytest.raises(Stopped):
        LatentCache(tmp_path / "cache", FINGERPRINT).encode(jobs, stops, 2)
    kept = len(LatentCache(tmp_path / "cache", FINGERPRINT).store)
    assert 0 < kept <= 6
    rest = Encoder()
    LatentCache(tmp_path / "cache", FINGERPRINT).encode(jobs, rest, 2)
    assert sum(shape[0] for shape in rest.batches) == len(jobs) - kept


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_names_its_image(tmp_path, jobs, broken):
    def overflows(images: torch.Tensor) -> torch.Tensor:
        moments = Encoder()(images)
        moments[-1, 0, 0, 0] = broken
        return moments

    with pytest.raises(NonFiniteLatent, match=r"0\.png.*MODEL_NAME"):
        LatentCache(tmp_path / "cache", FINGERPRINT).encode(jobs[:1], overflows, 4)
    assert len(LatentCache(tmp_path / "cache", FINGERPRINT).store) == 0


def test_images_that_cannot_be_decoded_are_told_and_the_others_encoded(tmp_path, jobs):
    broken = tmp_path / "broken.png"
    broken.write_bytes(jobs[0].path.read_bytes()[:200])
    cache = LatentCache(tmp_path / "cache", FINGERPRINT)
    failed = cache.encode([*jobs, job(broken, *next((size, boxes[0]) for size, boxes in BOXES.items()))], Encoder(), 4)
    assert list(failed) == [broken] and len(cache.store) == len(jobs)


def test_two_processes_share_the_work(tmp_path, jobs):
    halves = [Encoder(), Encoder()]
    for number, encode in enumerate(halves):
        cache = LatentCache(tmp_path / "cache", FINGERPRINT)
        cache.encode(jobs, encode, 4, mine=lambda key: int(key[0], 16) % 2 == number)
    assert sum(shape[0] for encode in halves for shape in encode.batches) == len(jobs)
    assert all(encode.batches for encode in halves)
    assert len(LatentCache(tmp_path / "cache", FINGERPRINT).store) == len(jobs)
