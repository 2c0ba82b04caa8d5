"""Open image files safely, and decode them to the size that is needed: oriented, sRGB, 8 bit, alpha on white."""

from __future__ import annotations

import io
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from helpers.images import downsampling
from helpers.sizes import Size

MAX_PIXELS = 150_000_000
"""The largest picture that is opened (decoded: 600 MB). The largest cameras in use have 100 to 150 million pixels."""

DRAFT_MARGIN = 3
"""A JPEG is decoded at the smallest scale that is still this many times the needed size: a zone plate keeps 47 dB
against a full decode, where a margin of 2 keeps 40."""

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "AVIF",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "JPEG2000",
    "PPM",
    "PCX",
    "SGI",
    "DDS",
    "PSD",
    "ICO",
    "QOI",
)
"""Pillow's raster formats that say what they are in their first bytes. Not EPS (runs Ghostscript) and stubs."""

BAD_FILE = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    MemoryError,
)
"""What Pillow's decoders raise on damaged files; measured by cutting and flipping bytes of every format."""

SIGNATURES = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
)
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
LARGEST_EXIF = 1_000_000  # bytes; JPEG's own limit is 65,533
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


class Unreadable(Exception):
    """An image file that cannot be used; `reason` says why in words, without the file's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def may_pass(self) -> bool:
        """Whether a disk, a permission or a lack of memory is at fault, and not the file's bytes."""
        cause = self.__cause__
        return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)


class NotAnImage(Unreadable):
    """A file whose content does not even look like an image."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its size after EXIF orientation, and whether only its first frame will be used."""

    size: Size
    has_more_frames: bool


def inspect(path: Path) -> Header:
    """The header of an image file.

    Raises:
        Unreadable: if it is no regular file, no image, too large, or its header is damaged. Damaged pixels are only
            seen by `load`.
    """
    with _opened(path) as image:
        # An MPO is a photograph with its gain map or preview behind it, not an animation.
        more = image.format != "MPO" and getattr(image, "is_animated", False)
        return Header(_oriented(Size(*image.size), _orientation(image)), more)


def load(path: Path, size: Size, method: str = "stepwise") -> np.ndarray:
    """Decode an image at exactly `size` (after EXIF orientation).

    Args:
        method: "stepwise" (25 % at a time) or "single".

    Returns:
        uint8 [H, W, 3], sRGB, transparency shown on white; the first frame of an animation.

    Raises:
        Unreadable: as `inspect`, and if the pixels are damaged or cut short.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        needed = _oriented(size, orientation)
        draft = image.draft("RGB", (DRAFT_MARGIN * needed.width, DRAFT_MARGIN * needed.height))
        image.load()
        profile = image.info.get("icc_profile")
        shrunk = downsampling.resize(_eight_bit(image), needed, method, box=draft[1] if draft else None)
    shrunk = _to_srgb(shrunk, profile)
    # Turning comes last: it is cheaper on the small picture.
    return np.array(shrunk.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else shrunk)


def transparent_share(path: Path) -> float:
    """The share of an image's pixels that are not opaque, 0 to 1; only images that may have such are decoded.

    Raises:
        Unreadable: as `load`.
    """
    with _opened(path) as image:
        if not image.has_transparency_data or image.mode.startswith("I"):
            return 0.0
        histogram = image.convert("RGBA").getchannel("A").histogram()
        return 1 - histogram[255] / sum(histogram)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        # A pipe or a device would hang `open`, so the kind of file is asked first.
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unreadable("is not a regular file")
        with path.open("rb") as stream, _identified(stream) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise Unreadable(f"has more than {MAX_PIXELS // 10**6} megapixels") from error
    except BAD_FILE as error:
        raise Unreadable(_in_words(error)) from error


def _identified(stream: BinaryIO) -> Image.Image:
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise _unidentified(stream.read(512)) from error
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def _unidentified(start: bytes) -> Unreadable:
    """What a file that Pillow does not know is, by its first bytes."""
    if not start:
        return NotAnImage("is empty")
    if start[4:8] == b"ftyp":
        return Unreadable("is HEIC or another format that is not read here: convert it to JPEG or PNG")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return Unreadable("is SVG, a drawing without pixels: convert it to PNG")
    if text.startswith((b"<!doctype html", b"<html")):
        return NotAnImage("is a web page, not an image")
    if start.startswith(b"version https://git-lfs"):
        return NotAnImage("is a pointer of Git LFS, not the image itself: run `git lfs pull` in its folder")
    name = next((name for signature, name in SIGNATURES if start.startswith(signature)), None)
    return Unreadable(f"is {name} with a damaged header") if name else NotAnImage("is not an image")


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    return f"is damaged: {error or type(error).__name__}"


def _oriented(size: Size, orientation: int) -> Size:
    return Size(size.height, size.width) if orientation >= 5 else size


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, still to be applied; 1 if there is none, or it makes no sense."""
    if image.format == "TIFF":
        return 1  # Pillow's reader turns TIFF by itself, and tells the turned size.
    if image.format == "PNG" and "exif" not in image.info:
        image.info["exif"] = _late_exif(image.fp)
    try:
        # PngImageFile.getexif would decode the whole picture first.
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
    except BAD_FILE:
        return 1
    return value if value in TRANSPOSES else 1


def _late_exif(stream: BinaryIO) -> bytes | None:
    """The eXIf chunk of a PNG, which may stand behind the pixels; the stream is left where it was."""
    position = stream.tell()
    stream.seek(8)
    data = None
    while len(head := stream.read(8)) == 8 and data is None:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf" and length <= LARGEST_EXIF:
            data = stream.read(length)
        stream.seek(length + 4, io.SEEK_CUR)
    stream.seek(position)
    return data


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture in a mode that can be shrunk and has no alpha: L, RGB, CMYK or LAB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image)
    if image.has_transparency_data:
        return _on_white(image, "L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """More than 8 bits of grey, scaled to 8: Pillow's own conversion would clip all above 255 to white.

    16 bits are divided by 257. Wider files do not say which value is white: it is the smallest of 1.0 (fractions
    only), 255, 65535 and 2^32 - 1 that holds their brightest pixel.
    """
    values = np.asarray(image)
    if values.dtype.kind == "i" and values.min() < 0:
        values = values.view(np.uint32)  # Pillow keeps unsigned 32-bit files in signed numbers.
    top = values.max()
    if not np.isfinite(top):
        raise ValueError("some pixels are not numbers")
    if image.mode.startswith("I;16"):
        white = 65535
    else:
        white = next((full for full in (1, 255, 65535) if top <= full and (full > 1 or image.mode == "F")), 2**32 - 1)
    grey = np.clip(values * np.float32(255 / white) + np.float32(0.5), 0, 255).astype(np.uint8)
    key = image.info.get("transparency")
    return Image.fromarray(grey if not isinstance(key, int) else np.where(values == key, np.uint8(255), grey))


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    with_alpha = image.convert("LA" if mode == "L" else "RGBA")
    picture = Image.new(mode, image.size, "white")
    picture.paste(with_alpha.convert(mode), mask=with_alpha.getchannel("A"))
    return picture


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        # A grey picture may carry a profile for RGB, which is then meant for its three equal channels.
        for candidate in (image.mode, "RGB") if image.mode == "L" else (image.mode,):
            if transform := _srgb_transform(profile, candidate):
                return transform.apply(image.convert(candidate))
    return image.convert("RGB")


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an embedded profile to sRGB; None if the profile is damaged or made for another kind of picture.

    Kept because building one takes longer than using it on a small picture. NOCACHE makes it safe to share between
    threads.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if PROFILE_MODES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        return ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=ImageCms.Flags.NOCACHE
        )
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
