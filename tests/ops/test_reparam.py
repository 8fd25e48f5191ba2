"""Folding is exact and leaves the original layers unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import randomise

from ops.reparam import (
    fold_norm_after,
    fold_norm_before,
    fold_scale_after,
    fuse_children,
    norm_affine,
)


def _norm(chs: int, kind: type[nn.Module] = nn.BatchNorm2d, affine: bool = True) -> nn.Module:
    norm = kind(chs, affine=affine).double().eval()
    if affine:
        return randomise(norm)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def _input(chs: int) -> Tensor:
    return torch.randn(2, chs, 7, 6, dtype=torch.float64)


@given(
    groups=st.sampled_from([1, 2, 6]),
    bias=st.booleans(),
    affine=st.booleans(),
    stride=st.integers(1, 2),
    kernel=st.integers(1, 3),
)
@torch.no_grad()
def test_norm_after(groups: int, bias: bool, affine: bool, stride: int, kernel: int) -> None:
    conv = nn.Conv2d(6, 12, kernel, stride, 1, groups=groups, bias=bias).double()
    norm = _norm(12, affine=affine)
    weight = conv.weight.clone()
    x = _input(6)
    torch.testing.assert_close(fold_norm_after(conv, norm)(x), norm(conv(x)))
    assert torch.equal(conv.weight, weight)


@given(bias=st.booleans(), kernel=st.integers(1, 3))
@torch.no_grad()
def test_norm_before_conv(bias: bool, kernel: int) -> None:
    conv = nn.Conv2d(6, 4, kernel, stride=kernel, bias=bias).double()
    norm = _norm(6)
    x = _input(6)
    torch.testing.assert_close(fold_norm_before(norm, conv)(x), conv(norm(x)))


@torch.no_grad()
def test_norm_before_linear() -> None:
    linear = nn.Linear(6, 4).double()
    norm = _norm(6, nn.BatchNorm1d)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(fold_norm_before(norm, linear)(x), linear(norm(x)))


@torch.no_grad()
def test_scale_after() -> None:
    for layer, shape in ((nn.Conv2d(6, 4, 3, bias=False), (1, 4, 1, 1)), (nn.Linear(6, 4), (4,))):
        layer = layer.double()
        x = _input(6) if isinstance(layer, nn.Conv2d) else torch.randn(5, 6).double()
        scale, shift = torch.randn(4).double(), torch.randn(4).double()
        expected = layer(x) * scale.view(shape)
        torch.testing.assert_close(fold_scale_after(layer, scale)(x), expected)
        torch.testing.assert_close(
            fold_scale_after(layer, scale, shift)(x), expected + shift.view(shape)
        )


def test_what_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        norm_affine(nn.BatchNorm2d(3, track_running_stats=False))
    for conv in (nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1, groups=6)):
        with pytest.raises(ValueError, match="with padding or groups"):
            fold_norm_before(nn.BatchNorm2d(6), conv)


def test_fuse_children_replaces_and_descends() -> None:
    class Leaf(nn.Module):
        def fuse(self) -> nn.Module:
            return nn.Identity()

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = Leaf()

        def fuse(self) -> nn.Module:
            return self

    root = nn.Sequential(Leaf(), nn.Sequential(Inner()))
    fuse_children(root)
    assert not any(isinstance(m, Leaf) for m in root.modules())
    assert isinstance(root[1][0], Inner)
