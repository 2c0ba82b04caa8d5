"""Files as they are found in the wild: each is either shown as a viewer would show it, or refused with the reason."""

from __future__ import annotations

import os
import signal
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from helpers.images.loading import MAX_PIXELS, NotAnImage, Unreadable, inspect, load
from helpers.sizes import Size

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")
SIZE = Size(8, 8)
WHITE = (255, 255, 255)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SRGB_COLORANTS = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3_COLORANTS = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"hangs for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def noise(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def colours(path: Path) -> list[tuple[int, ...]]:
    """The colours of the left and right half, away from the edge between them and its ringing."""
    pixels = load(path, Size(32, 32))
    return [tuple(int(value) for value in pixels[16, x]) for x in (3, 28)]


def halves(mode: str, left: object, right: object, edge: int = 64) -> Image.Image:
    picture = Image.new(mode, (edge, edge), left)
    picture.paste(right, (edge // 2, 0, edge, edge))
    return picture


def near(found: list[tuple[int, ...]], *expected: tuple[int, ...], tolerance: int = 2) -> bool:
    return bool(np.abs(np.array(found) - np.array(expected)).max() <= tolerance)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG of that declared size with next to no pixels in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(bytes(3 * 16 + 1))), chunk(b"IEND", b""))
    return PNG_SIGNATURE + b"".join(parts)


def icc_profile(colorants: np.ndarray | None, gamma: float) -> bytes:
    """A display profile of these red, green and blue colorants (XYZ at D50), or a grey one."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"
    d50 = (0.9642, 1.0, 0.8249)
    tags = {b"desc": b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(78), b"wtpt": xyz(d50)}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        for index, letter in enumerate(b"rgb"):
            tags[bytes([letter]) + b"XYZ"] = xyz(colorants[:, index])
            tags[bytes([letter]) + b"TRC"] = curve
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"GRAY" if colorants is None else b"RGB "
    header = struct.pack(">I", start + len(body)) + b"\0\0\0\0\x02\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + xyz(d50)[8:]
    return header.ljust(128, b"\0") + table + body


def xyz(values: np.ndarray | tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def in_srgb(colour: tuple[int, int, int], colorants: np.ndarray, gamma: float) -> tuple[int, ...]:
    """What a colour of such a profile is in sRGB, by the definition of both."""
    linear = np.linalg.solve(SRGB_COLORANTS, colorants @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in np.round(encoded * 255))


# --- No images


@pytest.mark.parametrize(
    "content, kind, word",
    [
        (b"", NotAnImage, "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", NotAnImage, "web page"),
        (b"\xef\xbb\xbf\n <HTML>404", NotAnImage, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", NotAnImage, "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), Unreadable, "HEIC"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", Unreadable, "SVG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), Unreadable, "PNG with a damaged header"),
        (b"\xff\xd8\xff\xe0", Unreadable, "JPEG with a damaged header"),
        (b"just words", NotAnImage, "not an image"),
    ],
)
def test_what_is_no_image_is_refused_with_what_it_is(tmp_path: Path, content: bytes, kind: type, word: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    for attempt in (inspect, lambda path: load(path, SIZE)):
        with pytest.raises(Unreadable) as error:
            attempt(path)
        assert type(error.value) is kind and word in error.value.reason and "\n" not in error.value.reason


def test_a_pipe_a_socket_and_a_folder_are_refused_and_do_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jpg")
    Path("folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        for name in ("pipe.jpg", "folder.jpg", "socket.jpg"):
            with no_longer_than(5), pytest.raises(Unreadable, match="not a regular file"):
                inspect(Path(name))


# --- Damage


@pytest.mark.parametrize(
    "suffix, options",
    [
        (".jpg", {}),
        (".jpg", {"progressive": True}),
        (".png", {}),
        (".webp", {}),
        (".gif", {}),
        (".tif", {}),
        (".bmp", {}),
        (".avif", {}),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, suffix: str, options: dict, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    noise().save(path, **options)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(Unreadable):
        load(path, SIZE)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_an_animation_that_ends_after_its_first_frame_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    data = path.read_bytes()
    second = data.index(b",", data.index(b",") + 10)
    for cut in range(second, second + 12):
        path.write_bytes(data[:cut])
        try:
            inspect(path)
        except Unreadable as error:
            assert error.reason.startswith("is damaged")


def test_damage_of_any_byte_never_escapes_as_another_error(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in (".jpg", ".png", ".webp", ".gif", ".avif", ".bmp", ".jp2"):
        path = tmp_path / f"image{suffix}"
        noise().save(path, **({"exif": exif} if suffix in (".jpg", ".png", ".webp", ".avif") else {}))
        intact = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            damaged = intact.copy()
            damaged[draw.integers(0, min(600, len(damaged)), 4)] = draw.integers(0, 256, 4)
            path.write_bytes(damaged[: draw.integers(1, len(damaged) + 1)].tobytes())
            try:
                load(path, SIZE)
            except Unreadable as error:
                assert error.reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(60000, 60000), (13000, 12000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    for attempt in (inspect, lambda path: load(path, SIZE)):
        with pytest.raises(Unreadable, match="more than 150 megapixels"):
            attempt(path)


def test_a_huge_compressed_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(png(4, 4))
    assert inspect(path).size == Size(4, 4)
    path.write_bytes(png(4, 4, chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(5_000_000)))))
    with pytest.raises(Unreadable, match="too large"):
        inspect(path)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_corrupt_exif_is_ignored(tmp_path: Path, suffix: str, exif: bytes) -> None:
    path = tmp_path / f"image{suffix}"
    noise().save(path, exif=exif)
    assert inspect(path).size == Size(96, 64)
    assert load(path, Size(48, 32)).shape == (32, 48, 3)


@pytest.mark.parametrize("size", [(10000, 1), (1, 1), (1, 3000)])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_extreme_sizes_are_told_and_loaded_as_asked(tmp_path: Path, suffix: str, size: tuple) -> None:
    path = tmp_path / f"thin{suffix}"
    Image.new("RGB", size, (10, 200, 30)).save(path)
    assert inspect(path).size == Size(*size)
    assert near([tuple(load(path, SIZE)[4, 4])], (10, 200, 30), tolerance=5)


# --- More than 8 bits


def ramp(full: int, dtype: type) -> np.ndarray:
    return np.broadcast_to((np.arange(16) * (full / 15)).round(6), (16, 16)).astype(dtype)


@pytest.mark.parametrize(
    "name, values",
    [
        ("grey16.png", ramp(65535, np.uint16)),
        ("grey16.tif", ramp(65535, np.uint16)),
        ("grey32.tif", ramp(2**31 - 1, np.int32)),
        ("grey16in32.tif", ramp(65535, np.int32)),
        ("grey8in32.tif", ramp(255, np.int32)),
        ("unit.tif", ramp(1, np.float32)),
        ("bytes.tif", ramp(255, np.float32)),
        ("shorts.tif", ramp(65535, np.float32)),
    ],
)
def test_more_than_8_bits_are_scaled_and_not_clipped(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / name)
    white = 127.5 if name == "grey32.tif" else 255
    pixels = load(tmp_path / name, Size(16, 16))
    assert np.abs(pixels[5, :, 1] - np.arange(16) * white / 15).max() <= 1
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_unsigned_32_bits_use_their_whole_range(tmp_path: Path) -> None:
    path = tmp_path / "unsigned.tif"
    Image.fromarray(ramp(2**32 - 1, np.uint32).view(np.int32)).save(path, tiffinfo={339: 1})
    assert np.abs(load(path, Size(16, 16))[5, :, 1] - np.arange(16) * 17).max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_not_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    values = ramp(1, np.float32).copy()
    values[3, 3] = bad
    Image.fromarray(values).save(tmp_path / "bad.tif")
    with pytest.raises(Unreadable, match="not numbers"):
        load(tmp_path / "bad.tif", SIZE)


# --- Transparency: on white, and the hidden colour stays hidden


@pytest.mark.parametrize(
    "picture, options, left, right",
    [
        (halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), {}, WHITE, (0, 0, 255)),
        (halves("RGBA", (255, 0, 0, 128), (0, 0, 255, 255)), {}, (255, 127, 127), (0, 0, 255)),
        (halves("LA", (0, 0), (90, 255)), {}, WHITE, (90, 90, 90)),
        (halves("LA", (0, 51), (90, 255)), {}, (204, 204, 204), (90, 90, 90)),
        (halves("RGB", (255, 0, 0), (0, 0, 255)), {"transparency": (255, 0, 0)}, WHITE, (0, 0, 255)),
        (halves("L", 0, 90), {"transparency": 0}, WHITE, (90, 90, 90)),
        (halves("1", 0, 1), {"transparency": 0}, WHITE, WHITE),
        (halves("I;16", 300, 90 * 257), {"transparency": 300}, WHITE, (90, 90, 90)),
    ],
    ids=["rgba", "half", "grey", "fifth", "colour key", "grey key", "bit key", "16-bit key"],
)
def test_transparency_is_shown_on_white(
    tmp_path: Path, picture: Image.Image, options: dict, left: tuple, right: tuple
) -> None:
    picture.save(tmp_path / "image.png", **options)
    assert near(colours(tmp_path / "image.png"), left, right)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_transparent_palette_colour_is_white(tmp_path: Path, suffix: str) -> None:
    picture = halves("P", 0, 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.save(tmp_path / f"image{suffix}", transparency=0)
    assert near(colours(tmp_path / f"image{suffix}"), WHITE, (0, 0, 255))


def test_a_palette_with_degrees_of_transparency_is_blended(tmp_path: Path) -> None:
    picture = halves("P", 0, 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.save(tmp_path / "image.png", transparency=bytes([128, 255]))
    assert near(colours(tmp_path / "image.png"), (255, 127, 127), (0, 0, 255))


def test_transparency_of_webp_and_tiff_is_shown_on_white(tmp_path: Path) -> None:
    for name, options in (("image.webp", {"lossless": True, "exact": True}), ("image.tif", {})):
        halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)).save(tmp_path / name, **options)
        assert near(colours(tmp_path / name), WHITE, (0, 0, 255))


# --- Colour


@pytest.mark.parametrize("name", ["image.jpg", "image.tif"])
def test_cmyk_is_shown_in_its_colours(tmp_path: Path, name: str) -> None:
    halves("CMYK", (0, 255, 255, 0), (255, 0, 0, 0)).save(tmp_path / name)
    assert near(colours(tmp_path / name), (255, 0, 0), (0, 255, 255), tolerance=4)


@pytest.mark.parametrize(
    "suffix, options",
    [(".jpg", {"quality": 100, "subsampling": 0}), (".png", {}), (".tif", {}), (".webp", {"lossless": True})],
)
def test_display_p3_is_brought_to_srgb(tmp_path: Path, suffix: str, options: dict) -> None:
    left, right = (200, 80, 60), (90, 160, 120)
    path = tmp_path / f"wide{suffix}"
    halves("RGB", left, right).save(path, icc_profile=icc_profile(P3_COLORANTS, 2.2), **options)
    expected = [in_srgb(colour, P3_COLORANTS, 2.2) for colour in (left, right)]
    assert not near([left, right], *expected, tolerance=10)
    assert near(colours(path), *expected, tolerance=3)


def test_transparent_display_p3_is_still_white_where_nothing_is(tmp_path: Path) -> None:
    halves("RGBA", (255, 0, 0, 0), (90, 160, 120, 255)).save(
        tmp_path / "a.png", icc_profile=icc_profile(P3_COLORANTS, 2.2)
    )
    assert near(colours(tmp_path / "a.png"), WHITE, in_srgb((90, 160, 120), P3_COLORANTS, 2.2), tolerance=3)


def test_a_grey_profile_and_a_grey_picture_with_a_colour_profile_are_honoured(tmp_path: Path) -> None:
    halves("L", 128, 255).save(tmp_path / "grey.png", icc_profile=icc_profile(None, 1.0))
    halves("L", 128, 255).save(tmp_path / "colour.png", icc_profile=icc_profile(SRGB_COLORANTS, 1.0))
    for name in ("grey.png", "colour.png"):
        assert near(colours(tmp_path / name), (188, 188, 188), WHITE)


@pytest.mark.parametrize(
    "mode, left, right, profile",
    [
        ("RGB", (200, 80, 60), (90, 160, 120), b"garbage"),
        ("RGB", (200, 80, 60), (90, 160, 120), bytes(400)),
        ("RGB", (200, 80, 60), (90, 160, 120), icc_profile(None, 1.0)),
        ("RGB", (200, 80, 60), (90, 160, 120), icc_profile(P3_COLORANTS, 2.2).replace(b"RGB ", b"\xff\xfe\xfd\xfc")),
    ],
)
def test_a_damaged_profile_or_one_for_other_pictures_is_ignored(
    tmp_path: Path, mode: str, left: tuple, right: tuple, profile: bytes
) -> None:
    halves(mode, left, right).save(tmp_path / "image.png", icc_profile=profile)
    assert near(colours(tmp_path / "image.png"), left, right)


# --- Several pictures in one file, and names that lie


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_of_an_animation_the_first_frame_is_used_and_that_is_known(tmp_path: Path, suffix: str) -> None:
    first, second = Image.new("RGB", (32, 16), (255, 0, 0)), Image.new("RGB", (32, 16), (0, 0, 255))
    first.save(tmp_path / f"several{suffix}", save_all=True, append_images=[second])
    first.save(tmp_path / f"one{suffix}")
    assert inspect(tmp_path / f"several{suffix}").has_more_frames
    assert not inspect(tmp_path / f"one{suffix}").has_more_frames
    assert near(colours(tmp_path / f"several{suffix}"), (255, 0, 0), (255, 0, 0), tolerance=5)


def test_a_photograph_with_a_preview_behind_it_is_no_animation(tmp_path: Path) -> None:
    noise(800, 600).save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    with Image.open(tmp_path / "phone.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert not inspect(tmp_path / "phone.jpg").has_more_frames
    assert load(tmp_path / "phone.jpg", Size(40, 30)).std() > 3


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image", "image.dat", "-rf.JPG", "a\nb.jpeg", "[1]*.webp"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str, form: str) -> None:
    noise().save(tmp_path / name, form)
    assert inspect(tmp_path / name).size == Size(96, 64)
    assert load(tmp_path / name, SIZE).shape == (8, 8, 3)


def test_a_name_that_is_not_utf8_is_opened(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xf0\x9f\x90\xb1.png"))
    noise().save(path)
    assert inspect(path).size == Size(96, 64)
    assert load(path, SIZE).shape == (8, 8, 3)


def test_postscript_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "image.eps"
    noise().save(path)
    with pytest.raises(NotAnImage):
        load(path, SIZE)


def test_pillows_own_settings_are_left_alone(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    noise().save(tmp_path / "image.png")
    load(tmp_path / "image.png", SIZE)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before == (89_478_485, False)
