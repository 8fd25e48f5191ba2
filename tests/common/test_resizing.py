"""Resizing for evaluation gives the pixels of timm's transform, with and without the kernel."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from backbones.common import resizing
from backbones.common.resizing import Resizing
from ops.cpu import build

CONFIG = {
    **{"input_size": (3, 48, 48), "interpolation": "bicubic", "crop_pct": 0.9},
    **{"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_mode": "center"},
}
SIZES = [(75, 100), (100, 75), (48, 48), (30, 41), (300, 60), (7, 3)]


def photo(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, (height, width, channels), np.uint8) * 255


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"interpolation": "bilinear"},
        {"interpolation": "lanczos"},
        {"crop_pct": 1.0},
        {"crop_mode": "squash"},
        {"crop_mode": "border"},
        {"input_size": (3, 32, 48)},
        {"input_size": (1, 48, 48), "mean": (0.5,), "std": (0.25,)},
    ],
)
@pytest.mark.parametrize("kernel", [True, False])
def test_is_timms(change, kernel, monkeypatch):
    config = {**CONFIG, **change}
    if not kernel:
        state = build.LibraryState(None, None, "avx2", "none here")
        monkeypatch.setitem(build.process.states, "resize", state)
    resize = pickle.loads(pickle.dumps(Resizing(config)))  # as spawned workers get it
    to_bytes = create_transform(**config, is_training=False, use_prefetcher=True)
    to_floats = create_transform(**config, is_training=False)
    for height, width in SIZES:
        pixels = photo(height, width, config["input_size"][0])
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        for given in (pixels, image):
            found = resize(given)
            assert np.array_equal(found, np.asarray(to_bytes(image))), (height, width)
        assert torch.equal(resize.normalise(found[None])[0], to_floats(image))


def test_the_kernel_computes_photographs(monkeypatch):
    """And not the transform, beside which everything would be right as well."""
    resize = Resizing(CONFIG)
    monkeypatch.setattr(resize, "_transform", None)
    for height, width in ((75, 100), (100, 75), (48, 48)):
        assert resize(photo(height, width)).shape == (3, 48, 48)


def test_a_pillow_that_rounds_differently(monkeypatch):
    """The installed Pillow decides: where the kernel differs from it, the transform runs."""
    plain = resizing.resize_part
    monkeypatch.setattr(resizing, "resize_part", lambda *given: plain(*given) ^ 1)
    resizing._matches_pillow.cache_clear()
    try:
        pixels = photo(75, 100)
        wanted = create_transform(**CONFIG, is_training=False, use_prefetcher=True)
        found = Resizing(CONFIG)(pixels)
    finally:
        resizing._matches_pillow.cache_clear()
    assert np.array_equal(found, np.asarray(wanted(Image.fromarray(pixels))))
