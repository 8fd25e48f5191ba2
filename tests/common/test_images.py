"""Image files of every mode become 8 bits per channel without a change of brightness."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from backbones.common.images import DECODE_ERRORS, as_8_bits, open_image
from backbones.data.sources import decode
from backbones.restoration.pictures import PictureError, read_picture

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8))
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey_of_16_bits(mode: str) -> Image.Image:
    return Image.frombytes(
        mode, (16, 16), (RAMP.astype(np.uint16) * 257).astype(">u2" if "B" in mode else "<u2")
    )


@pytest.mark.parametrize(
    "image",
    [
        grey_of_16_bits("I;16"),
        grey_of_16_bits("I;16B"),
        Image.fromarray(RAMP.astype(np.int32) * 257),
        Image.fromarray(RAMP.astype(np.float32) / 255),
        Image.fromarray(RAMP),
        Image.fromarray(np.stack([RAMP, 255 - RAMP], axis=2)),
        Image.fromarray(np.stack([RAMP] * 4, axis=2)),
    ],
    ids=["I;16", "I;16B", "I", "F", "L", "LA", "RGBA"],
)
def test_every_mode_keeps_its_brightness(image):
    for mode, shape in (("RGB", (16, 16, 3)), ("L", (16, 16))):
        seen = as_8_bits(image, mode)
        assert seen.mode == mode
        wanted = RAMP if mode == "L" else RAMP[:, :, None]
        assert np.array_equal(np.asarray(seen), np.broadcast_to(wanted, shape))


def test_modes_with_colours():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    palette = colours.convert("P")
    palette.info["transparency"] = bytes(range(256))  # Pillow warns when it is dropped
    for image in (palette, colours.convert("CMYK"), colours.convert("1")):
        bare = image.copy()
        bare.info.clear()
        assert np.array_equal(np.asarray(as_8_bits(image)), np.asarray(bare.convert("RGB")))
    assert as_8_bits(colours) is colours  # no copy in the loop of a training


def test_floats_and_16_bits_are_rounded():
    floats = np.array([[0, 0.9, 7.4, 7.6, 254.6]], np.float32) / 255
    assert np.asarray(as_8_bits(Image.fromarray(floats), "L")).tolist() == [[0, 1, 7, 8, 255]]
    whole = np.array([[0, 128, 129, 65406, 65407]], np.uint16)
    assert np.asarray(as_8_bits(Image.fromarray(whole), "L")).tolist() == [[0, 0, 1, 254, 255]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), 7.0, np.float32), "floating-point values from 7 to 7"),
        (np.full((2, 2), np.nan, np.float32), "save it with 8 or 16 bits"),
        (np.full((2, 2), 65536, np.int32), "from 65536 to 65536 exceed 16 bits"),
        (np.full((2, 2), -1, np.int32), "from -1 to -1 exceed 16 bits"),
    ],
)
def test_values_without_a_known_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        as_8_bits(Image.fromarray(values))


def saved(image: Image.Image, kind: str = "png", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    (tmp_path / "a.png").write_bytes(saved(NOISE, exif=exif).getvalue())
    with Image.open(tmp_path / "a.png") as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("notes", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0no", b"Exif\0\0"])
def test_damaged_metadata_is_ignored(notes):
    image = Image.new("RGB", (5, 4), (10, 20, 30))
    assert open_image(saved(image, exif=notes)).getpixel((0, 0)) == (10, 20, 30)


def test_not_an_image():
    for data in (b"", b"no image", saved(NOISE).getvalue()[:90]):
        with pytest.raises(DECODE_ERRORS):
            open_image(io.BytesIO(data))


def test_16_bits_in_files():
    for kind in ("png", "tiff"):
        seen = open_image(saved(grey_of_16_bits("I;16"), kind))
        assert np.array_equal(np.asarray(seen)[:, :, 0], RAMP)


@pytest.fixture
def postscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that Pillow would start Ghostscript for, under the name of a photograph."""
    path = tmp_path / "cat.jpg"
    NOISE.save(path, format="EPS")

    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    return path


def test_no_program_is_started_for_an_image(postscript):
    data = postscript.read_bytes()
    with_preview = b"\xc5\xd0\xd3\xc6" + bytes(28) + data
    for source in (postscript, str(postscript), io.BytesIO(data), io.BytesIO(with_preview)):
        with pytest.raises(OSError, match="cannot identify image file"):
            open_image(source)
    with pytest.raises(OSError, match="cannot identify image file"):
        decode(io.BytesIO(data))
    with pytest.raises(PictureError, match=r"cat\.jpg is not a readable image"):
        read_picture(postscript)
