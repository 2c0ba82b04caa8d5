"""Each image is trained with the conditioning image of its name, crop by crop, or is left out with the reason."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.caching.embeds import EmbedCache
from helpers.caching.pixels import PixelCache
from helpers.config.backends import ConditioningBackend, ImageBackend
from helpers.data.collate import CachedPixels, Collator, Source
from helpers.data.dataset import Dataset
from helpers.data.pairing import same_aspect
from helpers.data.preparation import cache_controls, cache_pixels, scan_and_plan
from helpers.data.sampler import Sampler
from helpers.data.scan import DatasetError
from helpers.images.loading import ORIENTATION
from helpers.sizes import Size

SIZE = (120, 90)


def picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0, orientation: int = 1) -> Path:
    """Noise, a few pixels wide; with an EXIF orientation in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 6, size[0] // 6, 3), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(noise).resize(size).save(path, exif=exif)
    return path


def backends(folder: Path, **keys: object) -> tuple[ImageBackend, ConditioningBackend]:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "edges").mkdir(exist_ok=True)
    cache = folder / "cache"
    keys = {"resolution": 64, **keys}
    image = ImageBackend(id="a", instance_data_dir=folder / "images", cache_dir=cache / "a", **keys)
    edges = {"id": "edges", "dataset_type": "conditioning", "instance_data_dir": folder / "edges"}
    return image, ConditioningBackend(**edges, cache_dir=cache / "edges")


def prepared(folder: Path, **keys: object) -> tuple[Dataset, tuple[str, ...], Source]:
    """The dataset as it is trained on, the notes about it, and where it is read: images as pixels too, to compare."""
    image, edges = backends(folder, **keys)
    dataset, notes = scan_and_plan(image, 8, conditioning=edges)
    dataset, pixels = cache_pixels(dataset, image)
    dataset, controls = cache_controls(dataset, image, edges)
    embeds = EmbedCache(folder / "text", {"text_encoder": "test"})
    embeds.build(["", *dataset.captions()], lambda texts: torch.zeros(len(texts), 77, 8).bfloat16(), len, 4)
    return dataset, notes, Source(pixels, embeds, controls)


def names(dataset: Dataset) -> dict[str, str]:
    """The images that are used, each with its conditioning image, by their places in their folders."""
    return {dataset.relative(r)[1:]: str(r.control.path).split("/edges/")[1] for r in dataset.records}


def reasons(dataset: Dataset) -> dict[str, str]:
    return {str(item.path).split("/images/")[1]: item.reason for item in dataset.left_out}


def test_partners_have_the_same_place_and_name_but_for_the_suffix(tmp_path):
    for name in ("a.jpg", "sub/a.png", "photo.2.webp"):
        picture(tmp_path / "images" / name)
    for name in ("a.png", "sub/a.jpg", "photo.2.png"):
        picture(tmp_path / "edges" / name, seed=1)
    dataset, notes, _ = prepared(tmp_path)
    assert names(dataset) == {"a.jpg": "a.png", "sub/a.png": "sub/a.jpg", "photo.2.webp": "photo.2.png"}
    assert not dataset.left_out and not notes


def test_an_image_without_a_partner_that_can_be_used_is_left_out_and_the_reason_told(tmp_path):
    for name in ("good", "lonely", "twice", "turned", "broken", "cut"):
        picture(tmp_path / "images" / f"{name}.jpg")
    for name in ("good.png", "twice.png", "twice.jpg", "cut.png", "spare.png"):
        picture(tmp_path / "edges" / name)
    picture(tmp_path / "edges" / "turned.png", SIZE[::-1])
    (tmp_path / "edges" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    cut = tmp_path / "edges" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:-1000])
    dataset, notes, _ = prepared(tmp_path)
    assert names(dataset) == {"good.jpg": "good.png"}
    found = reasons(dataset)
    assert found.keys() == {"lonely.jpg", "twice.jpg", "turned.jpg", "broken.jpg", "cut.jpg"}
    assert all(reason.startswith("no conditioning image: ") for reason in found.values())
    assert f"there is none of its name in {tmp_path}/edges" in found["lonely.jpg"]
    assert "there are several of its name, twice.jpg, twice.png: keep the one" in found["twice.jpg"]
    assert "turned.png is 90x120, of another aspect than 120x90" in found["turned.jpg"]
    assert "broken.png" in found["broken.jpg"] and "cut.png" in found["cut.jpg"]
    assert notes == (f"dataset 'a': 1 conditioning images belong to no image of it: {tmp_path}/edges/spare.png",)
    assert "5 left out" in dataset.report(1).describe()


def test_a_dataset_without_any_partner_is_refused_with_the_reasons(tmp_path):
    picture(tmp_path / "images" / "a.jpg"), picture(tmp_path / "edges" / "b.jpg")
    image, edges = backends(tmp_path)
    dataset, _ = scan_and_plan(image, 8, conditioning=edges)
    with pytest.raises(DatasetError, match="no conditioning image: there is none of its name"):
        dataset.require_images()


@pytest.mark.parametrize("a, b, same", [
    (Size(512, 512), Size(512, 512), True),
    (Size(1000, 667), Size(512, 342), True),  # rounded up
    (Size(1000, 667), Size(512, 341), True),  # rounded down
    (Size(1000, 667), Size(64, 43), True),
    (Size(512, 512), Size(512, 510), True),
    (Size(512, 512), Size(512, 500), False),
    (Size(640, 480), Size(480, 640), False),
    (Size(1000, 1000), Size(100, 95), False),
])
def test_an_aspect_is_the_same_to_a_pixel_or_two(a, b, same):
    assert same_aspect(a, b) == same_aspect(b, a) == same


RULES = {
    "square": {},
    "center": {"crop_style": "center"},
    "corner": {"crop_style": "corner"},
    "preserve": {"crop_aspect": "preserve"},
    "random aspects": {"crop_aspect": "random", "crop_aspect_buckets": [1.0, 0.75, 1.5]},
    "uncropped": {"crop": False},
    "downsampled first": {"maximum_image_size": 100, "target_downsample_size": 80},
    "by area": {"resolution": 0.005, "resolution_type": "area", "crop_aspect": "preserve"},
}


@pytest.mark.parametrize("keys", RULES.values(), ids=RULES)
def test_both_crops_are_the_same_part_of_the_picture_to_the_pixel(tmp_path, keys):
    """The conditioning images are copies of their images, which then must come out as these, over several epochs."""
    for number, size in enumerate([(120, 90), (90, 120), (131, 131), (200, 77)]):
        for orientation in (1, 3, 6, 7):
            for folder in ("images", "edges"):
                picture(tmp_path / folder / f"{number}_{orientation}.png", size, 10 * number + orientation, orientation)
    dataset, _, source = prepared(tmp_path, **keys)
    assert len(dataset.records) == 16
    collate, boxes = Collator({"a": source}, {"": "", **{c: c for c in dataset.captions()}}), set()
    for _, plan in islice(Sampler([dataset], 3, 42, 0.0).batches(), 24):
        batch = collate(plan)
        assert batch.control.dtype == torch.uint8 and torch.equal(batch.control, batch.images)
        boxes |= {use.box for use in plan.uses}
    assert len(boxes) > 1 or keys == RULES["corner"]


def test_a_partner_of_another_size_and_orientation_shows_the_same_part(tmp_path):
    """A ramp in x and y, of which each place in a crop can be told: to less than half a pixel of the smaller one."""

    def ramp(path: Path, width: int, height: int, turned: bool = False) -> None:
        x = (np.arange(width) + 0.5) / width * 255
        y = (np.arange(height) + 0.5) / height * 255
        pixels = np.stack([*np.broadcast_arrays(x[None, :], y[:, None]), np.zeros((height, width))], -1).round()
        image, exif = Image.fromarray(pixels.astype(np.uint8)), Image.Exif()
        path.parent.mkdir(exist_ok=True)
        if turned:
            image, exif[ORIENTATION] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(path, exif=exif)

    ramp(tmp_path / "images" / "wide.png", 240, 120)
    ramp(tmp_path / "edges" / "wide.png", 121, 61, turned=True)
    dataset, notes, source = prepared(tmp_path, maximum_image_size=200, target_downsample_size=100)
    assert ["are enlarged" in note for note in notes] == [True]
    collate = Collator({"a": source}, {c: c for c in ("", *dataset.captions())})
    for _, plan in islice(Sampler([dataset], 1, 42, 0.0).batches(), 8):
        batch = collate(plan)
        assert (batch.control.int() - batch.images.int()).abs().max() <= 0.5 * 255 / 61


def test_a_changed_partner_changes_the_datasets_digest_and_none_leaves_it_as_it_was(tmp_path):
    picture(tmp_path / "images" / "a.jpg"), picture(tmp_path / "edges" / "a.png")
    image, edges = backends(tmp_path)

    def digest(conditioning: ConditioningBackend | None) -> str:
        return scan_and_plan(image, 8, conditioning=conditioning)[0].digest()

    before = digest(edges)
    picture(tmp_path / "edges" / "a.png", seed=1)
    assert len({digest(None), before, digest(edges)}) == 3


def test_a_dataset_without_partners_gives_no_control(tmp_path):
    picture(tmp_path / "images" / "a.jpg"), picture(tmp_path / "edges" / "a.png")
    dataset, _, source = prepared(tmp_path)
    plain = replace(dataset, records=tuple(replace(record, control=None) for record in dataset.records))
    _, plan = next(Sampler([plain], 1, 42, 0.0).batches())
    batch = Collator({"a": source._replace(control=None)}, {"": "", "a": "a"})(plan)
    assert batch.control is None and batch.to(torch.device("cpu")).control is None
    assert not list(plain.control_jobs("stepwise"))
    assert isinstance(source.control, CachedPixels) and isinstance(source.control.cache, PixelCache)
