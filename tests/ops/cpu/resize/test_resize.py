"""Resizing part of an image gives the pixels of Pillow's resizing of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ops.cpu import build
from ops.cpu.resize.resize import MOST_SCALE, look_up, resize_part, unavailable

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIDES = st.integers(1, 90)


def pillows(pixels: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    """(C, height, width); each axis by a call of its own, rows first."""
    height, width = size
    planes = [
        np.asarray(
            Image.fromarray(pixels[:, :, c])
            .resize((width, pixels.shape[0]), RESAMPLING[filter])
            .resize((width, height), RESAMPLING[filter])
        )
        for c in range(pixels.shape[2])
    ]
    return np.stack(planes)


@settings(max_examples=150)
@given(st.data(), SIDES, SIDES, SIDES, SIDES, st.sampled_from([1, 3, 4]), st.booleans())
def test_any_part_of_any_image(data, height, width, new_height, new_width, channels, black) -> None:
    """Black and white noise exceeds 0 … 255 by far; other noise rounds in all ways."""
    chance = np.random.default_rng(height * 100 + width)
    pixels = chance.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if black:
        pixels = pixels // 128 * 255
    top, left = data.draw(st.integers(0, new_height - 1)), data.draw(st.integers(0, new_width - 1))
    rows = data.draw(st.integers(1, new_height - top))
    columns = data.draw(st.integers(1, new_width - left))
    filter = data.draw(st.sampled_from(sorted(RESAMPLING)))
    found = resize_part(pixels, (new_height, new_width), (top, left, rows, columns), filter)
    wanted = pillows(pixels, (new_height, new_width), filter)
    assert np.array_equal(found, wanted[:, top : top + rows, left : left + columns])


@pytest.mark.parametrize("size", [(375, 500), (1200, 1600), (9, 7000)])
@pytest.mark.parametrize("filter", sorted(RESAMPLING))
def test_photographs(size: tuple[int, int], filter: str) -> None:
    """Of common sizes, and a long filter; turned, so that they are not contiguous."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 2, (*size[::-1], 3), dtype=np.uint8).swapaxes(0, 1) * 255
    found = resize_part(pixels, (40, 60), (3, 8, 32, 45), filter)
    assert np.array_equal(found, pillows(pixels, (40, 60), filter)[:, 3:35, 8:53])


def test_looking_up() -> None:
    images = np.arange(2 * 3 * 5 * 7, dtype=np.uint8).reshape(2, 3, 5, 7)
    tables = np.random.default_rng(0).random((3, 256), np.float32)
    found = look_up(images, tables)
    for channel in range(3):
        assert np.array_equal(found[:, channel], tables[channel][images[:, channel]])
    with pytest.raises(ValueError, match=r"tables must be \(3, 256\) of float32"):
        look_up(images, tables[:1])
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\) of uint8"):
        look_up(images[0], tables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": np.zeros((4, 4, 3), np.int8)}, r"pixels must be .* got \(4, 4, 3\) of int8"),
        ({"pixels": np.zeros((4, 4), np.uint8)}, r"pixels must be \(H, W, C\)"),
        ({"pixels": np.zeros((0, 4, 3), np.uint8)}, "and not empty"),
        ({"box": (0, 1, 2, 2)}, "box must be a part of 2×2 pixels"),
        ({"box": (0, -1, 2, 2)}, "box must be a part of 2×2 pixels"),
        ({"box": (0, 0, 0, 2)}, "box must be a part of 2×2 pixels"),
        ({"filter": "lanczos"}, "filter must be bilinear or bicubic, got 'lanczos'"),
        (
            {"pixels": np.zeros((1, 2 * MOST_SCALE + 1, 3), np.uint8)},
            "801 pixels cannot be shrunk to 2: at most 400 to 1",
        ),
    ],
)
def test_what_is_refused(change: dict, message: str) -> None:
    arguments = {"size": (2, 2), "box": (0, 0, 2, 2), "filter": "bicubic"}
    arguments["pixels"] = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        resize_part(**{**arguments, **change})


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable() is None
    missing = build.LibraryState(None, None, "avx2", "none here")
    monkeypatch.setitem(build.process.states, "resize", missing)
    assert unavailable() == "none here"
    with pytest.raises(RuntimeError, match="the kernel resize is not available: none here"):
        resize_part(np.zeros((4, 4, 3), np.uint8), (2, 2), (0, 0, 2, 2), "bicubic")
