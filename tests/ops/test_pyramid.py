"""The pyramid of one map."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ops.pyramid import SimplePyramid


@torch.no_grad()
def test_levels_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    pyramid = SimplePyramid(16)
    x = torch.randn(2, 16, 6, 5)
    maps = pyramid(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 24, 20), (8, 12, 10), (16, 6, 5), (16, 3, 3)]
    assert tuple(m.shape[1] for m in maps) == pyramid.channels
    first, norm, _, second = pyramid[0]
    middle = F.conv_transpose2d(x, first.weight, first.bias, stride=2)
    middle = F.layer_norm(middle.permute(0, 2, 3, 1), (8,), norm.weight, norm.bias, 1e-6)
    middle = F.gelu(middle).permute(0, 3, 1, 2)
    expected = F.conv_transpose2d(middle, second.weight, second.bias, stride=2)
    torch.testing.assert_close(maps[0], expected)
    torch.testing.assert_close(maps[1], F.conv_transpose2d(x, *pyramid[1].parameters(), stride=2))
    assert torch.equal(maps[2], x)
    assert torch.equal(maps[3][:, :, :, :2], F.max_pool2d(x, 2))
    chosen = pyramid(x, [1, 3])
    assert torch.equal(chosen[0], maps[1]) and torch.equal(chosen[1], maps[3])


def test_other_widths_are_refused() -> None:
    for dim in (0, 2, 30):
        with pytest.raises(ValueError, match=f"multiple of 4, got {dim}"):
            SimplePyramid(dim)
