"""Decoding at a reduced size: as good as decoding in full, and never shifted or turned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.images.downsampling import resize
from helpers.images.loading import Unreadable, inspect, load
from helpers.sizes import Size

ORIENTATION = 0x0112


def zone_plate(size: Size, rings: float) -> np.ndarray:
    """uint8 [H, W]: rings that grow finer outwards, up to rings / 2 waves per picture width at the sides."""
    x = (np.arange(size.width, dtype=np.float32) + 0.5) / size.width - 0.5
    y = ((np.arange(size.height, dtype=np.float32) + 0.5) - size.height / 2) / size.width
    return np.round(127.5 + 120 * np.cos(np.pi * rings * (x[None] ** 2 + y[:, None] ** 2))).astype(np.uint8)


def decibels(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures."""
    return 10 * np.log10(255**2 / np.mean((image.astype(float) - reference.astype(float)) ** 2))


def shift(image: np.ndarray, reference: np.ndarray) -> float:
    """How many pixels the picture lies beside the reference, horizontally, by least squares."""
    reference = reference.astype(float)
    slope = np.gradient(reference, axis=1)
    return float(np.sum((image - reference) * slope) / np.sum(slope**2))


def decoded_in_full(path: Path, size: Size, method: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(resize(image.convert("RGB"), size, method))


def without_box(path: Path, size: Size) -> np.ndarray:
    """What the reduced decode gives when the box of `draft` is forgotten."""
    with Image.open(path) as image:
        image.draft("RGB", (3 * size.width, 3 * size.height))
        return np.asarray(resize(image.convert("RGB"), size, "single"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 12-megapixel JPEG with edges that are not multiples of 8."""
    path = tmp_path_factory.mktemp("odd") / "odd.jpg"
    Image.fromarray(zone_plate(Size(4242, 2828), 120)).save(path, quality=95)
    return path


# With a margin of 2 the second and third row would be 40 and 49 dB; the first is the worst that a margin of 3 allows.
# A full decode in 25 % steps is itself 41, 41, 50 and 45 dB away from a full decode in one leap.
@pytest.mark.parametrize(
    "size, rings, single, stepwise",
    [
        (Size(160, 120), 120, 46.5, 42.5),
        (Size(120, 90), 90, 50, 45),
        (Size(120, 90), 48, 54, 47),
        (Size(85, 64), 51, 47.5, 46),
    ],
)
def test_a_reduced_decode_keeps_a_zone_plate(
    tmp_path: Path, size: Size, rings: float, single: float, stepwise: float
) -> None:
    path = tmp_path / "zone.jpg"
    Image.fromarray(zone_plate(Size(2048, 1536), rings)).save(path, quality=95)
    assert decibels(load(path, size, "single"), decoded_in_full(path, size, "single")) > single
    assert decibels(load(path, size, "stepwise"), decoded_in_full(path, size, "stepwise")) > stepwise


def test_a_reduced_decode_of_an_odd_size_is_not_shifted(odd: Path) -> None:
    size = Size(192, 128)
    reference = decoded_in_full(odd, size, "single")
    assert decibels(load(odd, size, "single"), reference) > 50 > 40 > decibels(without_box(odd, size), reference)
    assert abs(shift(load(odd, size, "single"), reference)) < 0.003 < abs(shift(without_box(odd, size), reference))
    assert decibels(load(odd, size), decoded_in_full(odd, size, "stepwise")) > 46


def test_a_jpeg_is_never_decoded_below_three_times_the_needed_size(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(
        "helpers.images.downsampling.resize",
        lambda image, target, method, box: decoded.append((image.size, box)) or image.resize(target),
    )
    for size in (Size(192, 128), Size(353, 235), Size(354, 236), Size(706, 470), Size(708, 472), Size(1500, 1000)):
        load(odd, size)
        (width, height), box = decoded[-1]
        scale = 4242 / box[2]
        assert box == (0, 0, 4242 / scale, 2828 / scale)
        assert scale == 1 or (width >= 3 * size.width and height >= 3 * size.height)
        assert scale == 8 or 4242 / (2 * scale) < 3 * size.width or 2828 / (2 * scale) < 3 * size.height
    assert [4242 / box[2] for _, box in decoded] == [4, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".avif", ".tif", ".gif", ".bmp", ".jp2"])
@pytest.mark.parametrize("size", [Size(40, 30), Size(80, 60), Size(100, 90), Size(33, 77)])
def test_every_format_comes_at_exactly_the_size_asked_for(tmp_path: Path, suffix: str, size: Size) -> None:
    path = tmp_path / f"image{suffix}"
    Image.new("RGB", (80, 60), (200, 100, 50)).save(path)
    pixels = load(path, size)
    assert inspect(path).size == Size(80, 60)
    assert pixels.shape == (size.height, size.width, 3) and pixels.dtype == np.uint8
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize(
    "suffix, options",
    [(".jpg", {"quality": 95}), (".png", {}), (".webp", {"lossless": True}), (".tif", {}), (".avif", {"quality": 100})],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, options: dict, orientation: int) -> None:
    upright = np.zeros((48, 96, 3), np.uint8)
    upright[:24, :48] = (255, 0, 0)
    upright[24:, 48:] = (0, 0, 255)
    stored = Image.fromarray(upright)
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    if orientation in undo:
        stored = stored.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"turned{suffix}"
    stored.save(path, exif=exif, **options)
    assert inspect(path).size == Size(96, 48)
    pixels = load(path, Size(24, 12)).astype(int)
    assert np.abs(pixels - upright[2::4, 2::4]).max(axis=-1)[[2, 2, 9, 9], [4, 19, 4, 19]].max() < 30


def test_a_turned_photograph_is_decoded_reduced_too_and_not_shifted(odd: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "turned.jpg"
    with Image.open(odd) as image:
        image.save(path, quality=95, exif=exif)
    assert inspect(path).size == Size(2828, 4242)
    upright = np.rot90(decoded_in_full(path, Size(192, 128), "single"), k=-1)
    assert decibels(load(path, Size(128, 192), "single"), upright) > 50


def test_an_orientation_behind_the_pixels_of_a_png_is_found_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    path = tmp_path / "late.png"
    Image.new("RGB", (80, 60)).save(path, exif=exif)
    data = path.read_bytes()
    assert data.index(b"eXIf") < data.index(b"IDAT")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert inspect(path).size == Size(60, 80)


def test_probing_decodes_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".jpg", ".png", ".webp", ".tif", ".bmp"):
        Image.new("RGB", (80, 60)).save(tmp_path / f"plain{suffix}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    for path in tmp_path.iterdir():
        assert inspect(path).size == Size(80, 60)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="No such file"):
        inspect(tmp_path / "nothing.jpg")
