"""Parts of the stride-16 families."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import randomise

from ops.mobile import ConvFFN, ExpandMerging, NormLinearHead, Residual, conv_stem
from ops.reparam import fuse_children


@torch.no_grad()
def test_stem_and_merging_round_up() -> None:
    x = torch.randn(1, 3, 33, 47)
    widths = []
    for layer in conv_stem(3, 32):
        x = layer(x)
        widths.append(tuple(x.shape[1:]))
    assert widths == [(4, 17, 24), (8, 9, 12), (16, 5, 6), (32, 3, 3)]
    assert ExpandMerging(32, 48)(x).shape == (1, 48, 2, 2)


@torch.no_grad()
def test_residual_starts_as_identity_and_fuses() -> None:
    layer = nn.Sequential(Residual(ConvFFN(4, 8))).eval()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), x)
    expected = randomise(layer)(x)
    fuse_children(layer)
    assert isinstance(layer[0].fn.fc1, nn.Conv2d)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("distilled", [False, True])
def test_head(distilled: bool) -> None:
    head = NormLinearHead(6, 5, distilled=distilled)
    x = torch.randn(3, 6, 2, 2)
    out = head(x)
    if distilled:
        assert [o.shape for o in out] == [(3, 5), (3, 5)]
        head.eval()
        torch.testing.assert_close(
            head(x), (head.fc(x.mean((2, 3))) + head.fc_dist(x.mean((2, 3)))) / 2
        )
    else:
        assert out.shape == (3, 5)
    assert head(x, pre_logits=True).shape == (3, 6)
    head.reset(0)
    assert head.eval()(x).shape == (3, 6)
    head.reset(2, "catavgmax")
    assert head.eval()(x).shape == (3, 2)
    head.reset(0, "")
    assert head(x).shape == x.shape
