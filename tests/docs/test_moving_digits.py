"""The video example runs, and its videos are as described."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "moving_digits.py"


@pytest.fixture
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def test_digits_move(example):
    digits = torch.rand(3, 8, 8)
    images, ways = example.videos(digits, 8, "tiles", torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 64, 64)
    for image, way in zip(images, ways, strict=True):
        first, second, fifth = image[0, :16, :16], image[0, :16, 16:32], image[0, 16:32, :16]
        step = tuple(example.WAYS[way].tolist())
        assert torch.equal(second, first.roll(step, (0, 1)))
        assert torch.equal(fifth, first.roll(tuple(4 * s for s in step), (0, 1)))


@pytest.mark.parametrize("layout", ["tiles", "rows"])
def test_it_runs(example, layout):
    assert 0 <= example.main(["--steps", "2", "--batch-size", "2", "--layout", layout]) <= 1
