"""Reading and writing picture files of every kind."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from backbones.common.errors import FileError
from backbones.restoration.pictures import (
    Picture,
    PictureError,
    read_picture,
    read_size,
    write_picture,
)

ORIENTATION, MAKER, CAMERA = 0x0112, 0x010F, 0x8769
PROFILES = {
    channels: b"\0" * 16 + space + b"\0" * 108 for channels, space in ((1, b"GRAY"), (3, b"RGB "))
}
RANDOM = np.random.default_rng(0)


def pixels(*shape: int, kind: Any = np.uint8) -> np.ndarray:
    return RANDOM.integers(0, np.iinfo(kind).max + 1, shape, dtype=kind)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("alpha", [False, True])
def test_colour_and_alpha(suffix, alpha, tmp_path):
    array = pixels(6, 9, 4 if alpha else 3)
    Image.fromarray(array).save(
        tmp_path / f"a{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {})
    )
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.bits == 8 and not picture.is_grey and not picture.note
    assert np.array_equal(picture.pixels, array[:, :, :3])
    assert (picture.alpha is not None) == alpha
    if alpha:
        assert np.array_equal(picture.alpha, array[:, :, 3])
    if suffix != ".webp":
        write_picture(tmp_path / f"b{suffix}", picture)
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"b{suffix}")), array)
    for opaque in (".jpg", ".bmp"):
        write_picture(tmp_path / f"c{opaque}", picture)
        assert read_picture(tmp_path / f"c{opaque}").alpha is None


def test_palette(tmp_path):
    image = Image.fromarray(pixels(8, 8, 3)).quantize(16)
    image.save(tmp_path / "p.png")
    assert np.array_equal(read_picture(tmp_path / "p.png").pixels, np.asarray(image.convert("RGB")))
    image.save(tmp_path / "t.png", transparency=3)
    picture = read_picture(tmp_path / "t.png")
    expected = np.where(np.asarray(image) == 3, 0, 255)
    assert picture.alpha is not None and np.array_equal(picture.alpha, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "CMYK"])
def test_other_modes(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        image = Image.fromarray(pixels(5, 7, kind=np.uint16))
    else:
        image = Image.fromarray(pixels(5, 7, 3)).convert(mode)
    image.save(path)
    picture = read_picture(path)
    assert picture.is_grey == (mode != "CMYK")
    assert picture.bits == (16 if mode == "I;16" else 8)
    assert (picture.alpha is not None) == (mode == "LA")
    if mode in ("L", "I;16"):
        assert np.array_equal(picture.pixels[:, :, 0], np.asarray(image))
    if mode == "CMYK":
        assert np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))
    assert read_size(path) == (5, 7)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bits(suffix, channels, alpha, tmp_path):
    array = pixels(5, 8, channels, kind=np.uint16)
    opacity = pixels(5, 8, kind=np.uint16) if alpha else None
    path = tmp_path / f"a{suffix}"
    write_picture(path, Picture(array, opacity, icc=PROFILES[channels]))
    back = read_picture(path)
    # A grey TIFF with alpha is written as colour, which readers know.
    turned = suffix == ".tif" and alpha and channels == 1
    expected = array.repeat(3, 2) if turned else array
    assert back.bits == 16 and back.icc == (None if turned else PROFILES[channels])
    assert np.array_equal(back.pixels, expected)
    assert (back.alpha is None) == (opacity is None)
    if opacity is not None:
        assert np.array_equal(back.alpha, opacity)
    if suffix == ".tif":
        other = tifffile.imread(path)
        assert np.array_equal(other[..., :3] if other.ndim == 3 else other[..., None], expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_sixteen_bits(channels, tmp_path):
    """A PNG without alpha may name one colour that is not seen."""
    array = pixels(5, 8, channels, kind=np.uint16)
    array[0, :3] = clear = np.array([513, 7, 65535][:channels], np.uint16)
    array[1, 0] = clear ^ np.uint16(1)  # another one, though the same in 8 bits
    array[1, 1] = [clear[0] ^ 1, *clear[1:]]  # and one with the same green and blue
    path = tmp_path / "a.png"
    write_picture(path, Picture(array))
    name, data = b"tRNS", clear.astype(">u2").tobytes()
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    before, after = path.read_bytes().split(b"IDAT", 1)
    path.write_bytes(before[:-4] + chunk + before[-4:] + b"IDAT" + after)
    picture = read_picture(path)
    assert np.array_equal(picture.pixels, array)
    expected = np.where((array == clear).all(2), 0, 65535)
    assert (expected == 0).sum() >= 3
    assert picture.alpha is not None and picture.alpha.dtype == np.uint16
    assert np.array_equal(picture.alpha, expected)


def test_sixteen_bits_become_eight_where_the_format_has_no_more(tmp_path):
    array = np.array([[[0], [128], [257], [65535]]], dtype=np.uint16)
    write_picture(tmp_path / "a.webp", Picture(array.repeat(3, 2)), quality=100)
    assert Picture(array).show().tobytes() == bytes([0, 0, 1, 255])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, tmp_path):
    image = Image.fromarray(pixels(5, 8, 3))
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert np.array_equal(picture.pixels, np.asarray(ImageOps.exif_transpose(opened)))
    assert read_size(tmp_path / "a.png") == picture.pixels.shape[:2]


def test_damaged_metadata_is_ignored(tmp_path):
    array = pixels(5, 8, 3)
    Image.fromarray(array).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.pixels, array) and picture.exif is None
    assert read_size(tmp_path / "a.png") == (5, 8)


@pytest.mark.parametrize("source", ["tif", "jpg"])
def test_valid_metadata_is_kept(source, tmp_path):
    """Who took it and how long, but neither how the old file is built nor how large it was."""
    image = Image.fromarray(pixels(5, 8, 3))
    exif = image.getexif()
    exif[ORIENTATION], exif[MAKER] = 6, "a maker"
    if source == "jpg":
        exif.get_ifd(CAMERA).update({0x829A: 0.5, 0xA002: 8, 0xA003: 5})
    image.save(tmp_path / f"a.{source}", exif=exif)
    picture = read_picture(tmp_path / f"a.{source}")
    assert picture.pixels.shape == (8, 5, 3)
    larger = replace(picture, pixels=pixels(16, 10, 3), alpha=None, icc=PROFILES[3])
    for suffix in (".tif", ".png", ".jpg", ".webp"):
        write_picture(tmp_path / f"b{suffix}", larger)
        back = read_picture(tmp_path / f"b{suffix}")
        assert back.pixels.shape == (16, 10, 3) and back.icc == PROFILES[3]
        with Image.open(tmp_path / f"b{suffix}") as written:
            notes = written.getexif()
            assert notes[MAKER] == "a maker" and ORIENTATION not in notes
            assert notes.get_ifd(CAMERA) == ({0x829A: 0.5} if source == "jpg" else {})


def test_a_profile_of_other_channels_is_left_out(tmp_path):
    """CMYK becomes RGB without being asked for its profile."""
    profile = b"\0" * 16 + b"CMYK" + b"\0" * 108
    Image.fromarray(pixels(4, 4, 3)).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=profile)
    assert read_picture(tmp_path / "a.jpg").icc is None


def test_frames(tmp_path):
    frames = [Image.fromarray(pixels(4, 4, 3)) for _ in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / "a.tif")
    assert np.array_equal(picture.pixels, np.asarray(frames[0]))
    assert picture.note == "only the first of its 3 frames"


def test_damage_is_reported(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(pixels(64, 64, 3)).save(whole)
    data = whole.read_bytes()
    for name, content in {"cut": data[:3000], "text": b"hello", "empty": b""}.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        with pytest.raises(PictureError, match=f"{name}.png"):
            read_picture(path)
    with pytest.raises(PictureError, match="there is no file"):
        read_picture(tmp_path / "missing.png")
    with pytest.raises(PictureError, match="there is no file"):
        read_size(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "pipe.png")
    for read in (read_size, read_picture):
        with pytest.raises(PictureError, match=r"pipe\.png is a named pipe"):
            read(tmp_path / "pipe.png")
    # A checksum that Pillow does not look at and libpng does.
    write_picture(tmp_path / "sum.png", Picture(pixels(4, 4, 3, kind=np.uint16)))
    deep = bytearray((tmp_path / "sum.png").read_bytes())
    deep[-14] ^= 1
    (tmp_path / "sum.png").write_bytes(deep)
    with pytest.raises(PictureError, match=r"sum\.png cannot be read"):
        read_picture(tmp_path / "sum.png")
    # A head that promises 2³¹ columns.
    Image.new("RGB", (4, 4)).save(tmp_path / "huge.bmp")
    head = bytearray((tmp_path / "huge.bmp").read_bytes())
    head[18:22] = (2**31 - 1).to_bytes(4, "little")
    (tmp_path / "huge.bmp").write_bytes(head)
    for read in (read_size, read_picture):
        with pytest.raises(PictureError, match=r"huge\.bmp cannot be read"):
            read(tmp_path / "huge.bmp")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(PictureError, match="floating-point"):
        read_picture(tmp_path / "f.tif")


def test_failed_writes_leave_no_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"what was there")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=f"^cannot write {path}: no space is left"):
        write_picture(path, Picture(pixels(4, 4, 3)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"what was there"
    with pytest.raises(PictureError, match="must be one of .png"):
        write_picture(tmp_path / "a.gif", Picture(pixels(4, 4, 3)))
