"""Decoding of image files to 8-bit RGB or greyscale, whatever their format."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, features

from backbones.common.files import file_problem
from backbones.common.messages import one_line

DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(Image.DecompressionBombError, struct.error, zlib.error),
)
"""Exceptions that Pillow raises for damaged files."""

DECODERS = ("simplejpeg", "pillow")
"""What :func:`open_pixels` decodes ordinary JPEGs with; Pillow decodes everything else."""

# Formats that Pillow decodes in this process, by itself or with a plug-in. It passes PostScript to
# Ghostscript, an interpreter of programs, and only identifies the others.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JPEG2000", "PPM", "QOI"),
    *("ICO", "CUR", "ICNS", "PSD", "DDS", "PCX", "DCX", "SGI", "SUN", "FITS", "XBM", "XPM", "TGA"),
    *("IM", "IMT", "BLP", "FLI", "FTEX", "GBR", "IPTC", "MCIDAS", "MSP", "PCD", "PIXAR", "SPIDER"),
)

# Of pixels (H, W, …), by EXIF orientation.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
# Larger files are left to Pillow, which need not read what follows the image.
_MOST_BYTES = 1 << 28
_NAMED = 3  # skipped files in a message


@functools.cache
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of the formats that :func:`opened` decodes."""
    known = Image.registered_extensions()  # loads Pillow's plug-ins
    usable = {kind for kind in _FORMATS if kind in Image.OPEN} | {"MPO"}  # opened as JPEG
    return frozenset(ending for ending, kind in known.items() if kind in usable)


def has_image_ending(name: str | Path) -> bool:
    """Whether a file name has an image's ending; other files in folders are skipped."""
    return os.path.splitext(name)[1].lower() in image_endings()


def list_below(folder: str | Path) -> tuple[list[str], list[str]]:
    """The images and the other entries in a folder and its subfolders, as sorted relative paths.

    Linked folders are not followed. Entries that aren't files (named pipes, broken links) are
    listed too; reading them fails with the reason.
    """

    def fail(error: OSError) -> None:
        raise error

    images: list[str] = []
    others: list[str] = []
    for inner, _, names in os.walk(folder, onerror=fail):
        below = os.path.relpath(inner, folder)
        for name in names:
            path = name if below == os.curdir else os.path.join(below, name)
            (images if has_image_ending(name) else others).append(path)
    for paths in (images, others):
        paths.sort(key=lambda name: name.split(os.sep))
    return images, others


@dataclass
class Skipped:
    """Files that were skipped, because their names don't end like an image's."""

    count: int = 0
    names: list[str] = field(default_factory=list)  # of the first ones

    def add(self, names: Sequence[str], count: int | None = None) -> None:
        """Add ``count`` files, of which the first have these names; None for as many as names."""
        self.count += len(names) if count is None else count
        self.names += names[: _NAMED - len(self.names)]

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        some = ", ".join(one_line(name, 200) for name in self.names)
        more = ", …" if self.count > len(self.names) else ""
        files = "1 file" if self.count == 1 else f"{self.count} files"
        return f"skipped {files} without the ending of a known image format: {some}{more}"


def opened(source: str | Path | IO[bytes]) -> Image.Image:
    """``PIL.Image.open`` restricted to formats that start no other program."""
    Image.init()
    return Image.open(source, formats=[f for f in _FORMATS if f in Image.OPEN])


def open_image(source: str | Path | IO[bytes], mode: str = "RGB") -> Image.Image:
    """Decode an image file to 8 bits per channel, upright; of several frames, the first.

    An open file stays open; ``mode`` is ``RGB``, or ``L`` for greyscale. Damaged images, and values
    without a known range (:func:`as_8_bits`), raise one of :data:`DECODE_ERRORS`.
    """
    with opened(source) as image:
        image.load()
        turn = _TURNS.get(orientation_of(image))
        converted = as_8_bits(image, mode)
        return converted if turn is None else Image.fromarray(turn(np.asarray(converted)))


def installed_decoder() -> str:
    """The fastest of :data:`DECODERS` that returns the same pixels as :func:`open_image`.

    simplejpeg contains libjpeg-turbo, as Pillow's own wheels do. Other builds of Pillow may use a
    library that rounds differently.
    """
    usable = importlib.util.find_spec("simplejpeg") and features.check_feature("libjpeg_turbo")
    return "simplejpeg" if usable else "pillow"


def open_pixels(
    source: str | Path | IO[bytes], mode: str = "RGB", decoder: str = "pillow"
) -> np.ndarray:
    """:func:`open_image` as an array (H, W, 3), or (H, W, 1) for greyscale, uint8.

    ``decoder`` is one of :data:`DECODERS`, see :func:`installed_decoder`.
    """
    if decoder == "simplejpeg":
        with opened(source) as image:
            pixels = _by_simplejpeg(image, mode)
            if pixels is not None:
                return upright(pixels, orientation_of(image))
        if not isinstance(source, (str, Path)):
            source.seek(0)
    pixels = np.asarray(open_image(source, mode))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_pixels(path: Path, mode: str = "RGB") -> np.ndarray:
    """:func:`open_pixels` of a file with the fastest decoder; OSError if it is no regular file."""
    if (problem := file_problem(path)) is not None:
        raise OSError(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damage that doesn't affect pixels
        return open_pixels(path, mode, installed_decoder())


def _by_simplejpeg(image: Image.Image, mode: str) -> np.ndarray | None:
    """The pixels of an intact RGB or greyscale JPEG, as Pillow would decode it; None for others."""
    if image.format != "JPEG" or image.mode not in ("L", mode):
        return None
    import simplejpeg

    file: IO[bytes] = image.fp  # type: ignore[attr-defined]
    if file.seek(0, os.SEEK_END) > _MOST_BYTES:
        return None
    file.seek(0)
    data = file.read()
    try:
        # Strict: warnings are errors. What Pillow makes of such files, it says itself.
        grey = image.mode == "L"
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", strict=True)
    except (ValueError, MemoryError):
        return None
    if pixels.shape[:2] != (image.height, image.width):
        return None
    return pixels if mode == image.mode else pixels.repeat(3, axis=2)


def as_8_bits(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Convert a decoded image to ``mode``, RGB or L, without a copy if it has that mode.

    16-bit values are scaled, where Pillow's ``convert`` would clip at 255. Alpha is dropped
    without changing colours, as in torchvision and timm.
    """
    if image.mode == mode:
        return image
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
            raise ValueError(
                f"floating-point values from {values.min():g} to {values.max():g} have no known "
                "range; save it with 8 or 16 bits"
            )
        image = Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    elif image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"values from {values.min()} to {values.max()} exceed 16 bits; "
                "save it with 8 or 16 bits"
            )
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype("u1"))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when converting directly to RGB
    return image if image.mode == mode else image.convert(mode)


def upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """Pixels (H, W, …) with an EXIF orientation applied; values other than 1 … 8 are ignored."""
    turn = _TURNS.get(orientation)
    return pixels if turn is None else turn(pixels)


def orientation_of(image: Image.Image) -> Any:
    """The EXIF orientation; 1 if EXIF is damaged, which does not affect pixels."""
    with contextlib.suppress(*DECODE_ERRORS):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1
