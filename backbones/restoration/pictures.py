"""Reading and writing of picture files: every mode, 8 and 16 bits, atomically."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import putchunk
from torch import Tensor

from backbones.common.errors import DataError
from backbones.common.files import file_problem, write_atomically
from backbones.common.images import DECODE_ERRORS, opened, orientation_of, upright

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Suffixes of the files that pictures are written to."""
_16_BIT_SUFFIXES = (".png", ".tif", ".tiff")
# A TIFF also stores its structure as EXIF tags, which would be wrong for a new file.
_KEPT_TAGS = {
    *(ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model),
    *(ExifTags.Base.Software, ExifTags.Base.DateTime, ExifTags.Base.Artist),
    *(ExifTags.Base.Copyright, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo),
}
# Exceptions of Pillow and torchvision (RuntimeError) for damaged files.
_ERRORS = (*DECODE_ERRORS, RuntimeError)


class PictureError(DataError):
    """A picture that cannot be read or written; the message names the file."""


@dataclass(frozen=True)
class Picture:
    """An upright picture with its metadata."""

    pixels: np.ndarray  # uint8 or uint16 (H, W, 3), or (H, W, 1) if greyscale
    alpha: np.ndarray | None = None  # (H, W) of the same dtype; None if opaque
    icc: bytes | None = None  # the ICC profile, if it matches the pixels
    exif: bytes | None = None  # without the orientation and tags that describe the original file
    note: str = ""  # what was dropped

    @property
    def bits(self) -> int:
        """8 or 16."""
        return 8 * self.pixels.dtype.itemsize

    @property
    def is_grey(self) -> bool:
        """Whether there is a single channel."""
        return self.pixels.shape[2] == 1

    def show(self) -> Image.Image:
        """The picture as an 8-bit Pillow image, including alpha."""
        array = _planes(self)
        if self.bits > 8:
            array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright picture, from the file's header."""
    with _opened(path) as image:
        width, height = image.size
        turned = orientation_of(image) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def read_picture(path: Path) -> Picture:
    """Read PNG, JPEG, WebP, TIFF, or any other format that Pillow decodes by itself (not EPS).

    Palettes, CMYK and others become RGB, without their colour profile; EXIF orientation is applied.
    16 bits are kept; colour TIFF of 16 bits needs ``tifffile``. Of several frames, the first is
    used, and :attr:`Picture.note` says so.
    """
    with _opened(path) as image:
        image.load()
        frames = getattr(image, "n_frames", 1)
        icc, turn = image.info.get("icc_profile"), orientation_of(image)
        pixels, alpha = _arrays(image, path)
        exif = _kept_exif(image)
    note = f"only the first of its {frames} frames" if frames > 1 else ""
    return Picture(
        np.ascontiguousarray(upright(pixels, turn)),
        None if alpha is None else np.ascontiguousarray(upright(alpha, turn)),
        icc if icc and icc[16:20] == (b"GRAY" if pixels.shape[2] == 1 else b"RGB ") else None,
        exif,
        note,
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file opened by Pillow; all errors become PictureErrors."""
    if not os.path.lexists(path):
        raise PictureError(f"there is no file {path}")
    if (problem := file_problem(path)) is not None:
        raise PictureError(f"{path} {problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damage that doesn't affect pixels
            with opened(path) as image:
                yield image
    except PictureError:
        raise
    except _ERRORS as error:
        raise PictureError(_explain(path, error)) from error


def write_picture(path: Path, picture: Picture, quality: int = 95) -> None:
    """Write a picture atomically, in the format of the file's suffix, one of :data:`SUFFIXES`.

    16 bits are kept in PNG and TIFF (which needs ``tifffile``), alpha in PNG, WebP and TIFF, and
    EXIF data in all formats except BMP and 16-bit TIFF. ``quality`` is that of JPEG and WebP.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise PictureError(f"{path}: the ending of an output must be one of {', '.join(SUFFIXES)}")
    data = io.BytesIO()
    try:
        if picture.bits == 16 and suffix in _16_BIT_SUFFIXES:
            data.write((_png_16 if suffix == ".png" else _tiff_16)(picture))
        else:
            image = picture.show()
            if suffix in (".jpg", ".jpeg", ".bmp") and picture.alpha is not None:
                image = image.convert("L" if picture.is_grey else "RGB")
            options: dict[str, Any] = {"icc_profile": picture.icc, "exif": picture.exif}
            options = {key: value for key, value in options.items() if value}
            if suffix in (".jpg", ".jpeg"):
                options |= {"quality": quality, "subsampling": 0}
            elif suffix == ".webp":
                options |= {"quality": quality}
            elif suffix in (".tif", ".tiff"):
                exif = Image.Exif()
                exif.load(picture.exif or b"")
                # Pillow can't compress a TIFF with camera or GPS tags.
                if {ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo}.isdisjoint(exif):
                    options |= {"compression": "tiff_adobe_deflate"}
            elif suffix == ".bmp":
                options = {}
            image.save(data, format=Image.registered_extensions()[suffix], **options)
    except _ERRORS as error:
        raise PictureError(f"cannot write {path}: {error}") from error
    with data.getbuffer() as view:
        write_atomically(path, lambda file: file.write(view))


def to_tensor(pixels: np.ndarray, channels: int) -> Tensor:
    """uint8 or uint16 (H, W, 1 or 3) → float32 (channels, H, W) in 0 … 1."""
    limit = float(np.iinfo(pixels.dtype).max)
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / limit
    if x.shape[0] < channels:
        x = x.expand(channels, -1, -1)
    elif x.shape[0] > channels:
        weights = torch.tensor((0.299, 0.587, 0.114)).view(3, 1, 1)
        x = (x * weights).sum(0, keepdim=True)
    return x.contiguous()


def to_pixels(image: Tensor) -> np.ndarray:
    """(C, H, W) in 0 … 1 → uint8 (H, W, C), rounded and clipped."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def _kept_exif(image: Image.Image) -> bytes | None:
    """EXIF tags that remain valid for a picture made from this one."""
    with suppress(*DECODE_ERRORS):  # damaged tags don't affect pixels
        exif = image.getexif()
        for tag in set(exif) - _KEPT_TAGS:
            del exif[tag]
        camera = exif.get_ifd(ExifTags.IFD.Exif)
        for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
            camera.pop(tag, None)
        return exif.tobytes() if len(exif) else None
    return None


def _explain(path: Path, error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"{path} is not a readable image (damaged, or another kind of file)"
    return f"{path} cannot be read: {error}"


def _arrays(image: Image.Image, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (H, W, C) and alpha (H, W) as stored in the file."""
    if _has_16_bit_colour(image):
        array = _read_16_bits(path, str(image.format))
        if array.ndim == 2:
            array = array[:, :, None]
        if array.shape[2] in (2, 4):
            return array[:, :, :-1], array[:, :, -1]
        return array, _alpha_of_key_colour(image.info.get("transparency"), array)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise PictureError(f"{path} has values outside 16 bits")
        array = array.astype(np.uint16)[:, :, None]
        return array, _alpha_of_key_colour(image.info.get("transparency"), array)
    if image.mode == "F":
        raise PictureError(f"{path} has floating-point values; save it with 8 or 16 bits")
    return arrays_of(image)


def arrays_of(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels (H, W, C) and alpha (H, W) of an image in 8 bits."""
    colours = 1 if image.mode in ("1", "L", "LA") else 3
    if image.has_transparency_data:
        array = np.asarray(image.convert("RGBA"))
        return array[:, :, :colours], array[:, :, 3]
    array = np.asarray(image.convert("L" if colours == 1 else "RGB"))
    return array.reshape(*array.shape[:2], colours), None


def _alpha_of_key_colour(
    clear: int | tuple[int, ...] | None, pixels: np.ndarray
) -> np.ndarray | None:
    """Alpha of 16-bit pixels (H, W, C) with one transparent colour; None without one."""
    if clear is None:
        return None
    return np.where((pixels == np.array(clear)).all(2), 0, 65535).astype(np.uint16)


def _has_16_bit_colour(image: Image.Image) -> bool:
    """Whether the file has several 16-bit channels, which Pillow would reduce to 8 bits."""
    if image.format == "PNG":
        with open(image.filename, "rb") as file:  # type: ignore[attr-defined]
            head = file.read(26)
        return head[24] == 16 and head[25] in (2, 4, 6)
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
        bits = bits if isinstance(bits, tuple) else (bits,)
        return len(bits) > 1 and set(bits) == {16}
    return False


def _read_16_bits(path: Path, kind: str) -> np.ndarray:
    """uint16 (H, W, C) of a PNG or TIFF."""
    if kind == "PNG":
        from torchvision.io import ImageReadMode, decode_image, read_file

        with Image.open(path) as whole:
            whole.verify()  # wrong checksums crash the decoder of torchvision 0.29
        tensor = decode_image(read_file(str(path)), ImageReadMode.UNCHANGED)
        return tensor.permute(1, 2, 0).numpy()
    tifffile = _tifffile(f"{path}, a colour TIFF of 16 bits,")
    try:
        array = tifffile.imread(path, key=0)
    except tifffile.TiffFileError as error:
        raise PictureError(_explain(path, error)) from error
    if array.ndim == 3 and array.shape[0] in (3, 4) and array.shape[2] not in (3, 4):
        array = array.transpose(1, 2, 0)  # plane after plane
    return array.astype(np.uint16)


def _planes(picture: Picture) -> np.ndarray:
    """(H, W, C), alpha last."""
    if picture.alpha is None:
        return picture.pixels
    return np.concatenate([picture.pixels, picture.alpha[:, :, None]], 2)


def _png_16(picture: Picture) -> bytes:
    """A PNG of 16 bits, which Pillow cannot write in colour (RFC 2083)."""
    array = _planes(picture).astype(">u2")
    height, width, channels = array.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = array.reshape(height, -1).view(np.uint8)
    # Filter 2 of the format: each byte less the one above it.
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows - above], 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if picture.icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")]
    out = io.BytesIO()
    out.write(b"\x89PNG\r\n\x1a\n")
    for name, data in chunks:
        putchunk(out, name, data)
    return out.getvalue()


def _tiff_16(picture: Picture) -> bytes:
    if picture.is_grey and picture.alpha is not None:  # hardly any reader knows this kind
        picture = replace(picture, pixels=np.repeat(picture.pixels, 3, 2), icc=None)
    data = io.BytesIO()
    _tifffile("a TIFF of 16 bits").imwrite(
        data,
        np.squeeze(_planes(picture), 2) if picture.is_grey else _planes(picture),
        photometric="minisblack" if picture.is_grey else "rgb",
        extrasamples=None if picture.alpha is None else ["unassalpha"],
        compression="zlib",
        iccprofile=picture.icc,
        metadata=None,
        software=False,
    )
    return data.getvalue()


def _tifffile(kind: str) -> Any:
    try:
        import tifffile
    except ImportError:
        raise PictureError(f"{kind} needs tifffile: pip install tifffile") from None
    return tifffile
