"""JPEGs decoded by simplejpeg have Pillow's pixels, and other files are Pillow's."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from fuzzing import damage, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from backbones.common import images
from backbones.common.images import DECODE_ERRORS, installed_decoder, open_image, open_pixels

SUBSAMPLINGS = ("444", "422", "420", "440", "411")


def photo(height: int, width: int) -> Image.Image:
    """Smooth colours with sharp edges and noise."""
    chance = np.random.default_rng(height * 1000 + width)
    small = Image.fromarray(chance.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = pixels + chance.normal(0, 12, pixels.shape)
    pixels[height // 3 : height // 2] = (250, 10, 30)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def jpegs() -> Iterator[bytes]:
    for height, width in ((37, 53), (64, 48), (1, 1), (8, 17), (99, 2)):
        image = photo(height, width)
        grey = image.convert("L")
        for quality in (30, 90):
            for subsampling in SUBSAMPLINGS:
                options = {"quality": quality, "colorsubsampling": subsampling}
                yield simplejpeg.encode_jpeg(np.ascontiguousarray(image), **options)
            for options in ({}, {"progressive": True}, {"optimize": True}):
                yield saved(image, quality=quality, subsampling=2, **options)
                yield saved(grey, quality=quality, **options)
        yield saved(image, restart_marker_blocks=2)
        yield saved(image, restart_marker_rows=1, progressive=True)
        yield saved(image, keep_rgb=True)
        yield saved(image, icc_profile=b"a profile" * 9, comment=b"a comment")


JPEGS = list(jpegs())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether simplejpeg's pixels were taken, for each file."""
    seen: list[bool] = []
    plain = images._by_simplejpeg

    def noting(*given: Any) -> np.ndarray | None:
        pixels = plain(*given)
        seen.append(pixels is not None)
        return pixels

    monkeypatch.setattr(images, "_by_simplejpeg", noting)
    return seen


def both(data: bytes, mode: str = "RGB") -> np.ndarray:
    """Pillow's pixels, which simplejpeg's must equal."""
    wanted = np.asarray(open_image(io.BytesIO(data), mode))
    wanted = wanted[:, :, None] if wanted.ndim == 2 else wanted
    for decoder in images.DECODERS:
        found = open_pixels(io.BytesIO(data), mode, decoder)
        assert found.dtype == np.uint8
        assert np.array_equal(found, wanted), decoder
    return wanted


def test_pixels_are_pillows(decoded):
    """Pillow converts colours to greyscale in its own way."""
    assert installed_decoder() == "simplejpeg"
    for data in JPEGS:
        both(data)
    assert len(decoded) == len(JPEGS) and all(decoded)
    decoded.clear()
    for data in JPEGS:
        both(data, "L")
    with_colours = sum(Image.open(io.BytesIO(data)).mode == "RGB" for data in JPEGS)
    assert decoded.count(False) == with_colours


@pytest.mark.parametrize("orientation", range(10))
def test_the_orientation_of_the_camera(orientation, decoded):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = photo(20, 30)
    assert both(saved(image, exif=exif)).shape[:2] == (
        (30, 20) if 5 <= orientation <= 8 else (20, 30)
    )
    both(saved(image.convert("L"), exif=exif), "L")
    assert all(decoded)


def test_other_files_are_pillows(decoded):
    image = photo(24, 31)
    cmyk = saved(image.convert("CMYK"))
    file = io.BytesIO()
    image.save(file, "MPO", save_all=True, append_images=[image.rotate(90)])
    png = io.BytesIO()
    image.save(png, "PNG")
    for data in (cmyk, file.getvalue(), png.getvalue()):
        both(data)
    assert not any(decoded)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_paths(kind, decoded, tmp_path, monkeypatch):
    path = tmp_path / "a"
    photo(20, 30).save(path, kind)
    wanted = np.asarray(open_image(path))
    for source in (path, str(path)):
        assert np.array_equal(open_pixels(source, "RGB", "simplejpeg"), wanted)
    assert decoded == [kind == "JPEG"] * 2
    # Other libraries than libjpeg-turbo, which Pillow may be built with, round differently.
    with monkeypatch.context() as patch:
        patch.setattr(images.features, "check_feature", lambda name: False)
        assert installed_decoder() == "pillow"
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    assert installed_decoder() == "pillow"


def outcome(data: bytes, decoder: str) -> Any:
    try:
        return open_pixels(io.BytesIO(data), "RGB", decoder).tolist()
    except DECODE_ERRORS as error:
        return type(error), str(error).partition("<_io")[0]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damage that affects no pixel
def test_damaged_files_end_alike():
    """The same pixels, or the same reason: cut files, overwritten bytes, lost and added ones."""

    @fuzz(100)
    @given(st.sampled_from([data for data in JPEGS if len(data) > 700]), damage())
    def check(data: bytes, change: Callable[[bytes], bytes]) -> None:
        damaged = change(data)
        assert outcome(damaged, "simplejpeg") == outcome(damaged, "pillow")

    check()
    assert outcome(b"", "simplejpeg") == outcome(b"", "pillow")
