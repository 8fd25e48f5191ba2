"""Every option of the layers that networks share has its effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ops.conv import ConvHead, ConvResidual, InceptionDWConv2d
from ops.kan import KAN
from ops.mlp import DWMlp
from ops.mobile import ConvFFN, MBConv, MixHead, NormLinearHead, Residual
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import NeighborhoodBlock


def _block(drop: float, drop_path: float) -> NeighborhoodBlock:
    return NeighborhoodBlock(NeighborhoodAttention2D(4, 2, 3), 2.0, drop, drop_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: ConvResidual(4, drop_path=rate, norm_scale=1.0),
        lambda rate: Residual(nn.Linear(4, 4), rate),
        lambda rate: MBConv(4, 4, 3, 2, drop_path=rate),
        lambda rate: _block(0.0, rate),
    ],
)
def test_a_branch_that_is_always_dropped(make: Callable[[float], nn.Module]) -> None:
    x = torch.randn(2, 4, 4, 4)
    layer = make(1.0).train()
    assert torch.equal(layer(x), x)
    assert not torch.equal(layer.eval()(x), x)
    assert not torch.equal(make(0.0).train()(x), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: ConvHead(4, 6, 3, "avg", rate),
        lambda rate: MixHead(4, 6, 3, "avg", rate),
        lambda rate: NormLinearHead(4, 3, "avg", rate),
        lambda rate: NormLinearHead(4, 3, "avg", rate, distilled=True),
    ],
)
def test_heads_drop_what_they_classify(make: Callable[[float], nn.Module]) -> None:
    x, head = torch.rand(3, 4, 5, 5), make(1.0).train()
    assert not head(x, pre_logits=True).any()
    assert head.eval()(x, pre_logits=True).any() and make(0.0).train()(x, pre_logits=True).any()


def test_neighborhood_attention_drops_its_projection() -> None:
    layer, x = NeighborhoodAttention2D(4, 2, 3, proj_drop=1.0), torch.randn(1, 5, 4, 4)
    assert not layer(x).any() and layer.eval()(x).any()
    block = _block(1.0, 0.0).train()
    torch.testing.assert_close(block(x), x + block.attn(block.norm1(x)))


def test_depthwise_mlps_drop_hidden_channels_and_outputs() -> None:
    mlp = DWMlp(4, 64, drop=0.5).train()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.fill_(1.0)
        mlp.dwconv.weight.zero_()  # each hidden channel is the same everywhere
    torch.manual_seed(0)
    out = mlp(torch.randn(1, 8, 8, 4)).flatten()
    assert 0.3 < (out == 0).float().mean() < 0.7, "outputs"
    assert len(out[out != 0].unique()) > 5, "hidden channels"
    assert len(mlp.eval()(torch.randn(1, 8, 8, 4)).unique()) == 1


def test_kans_pass_their_options_to_each_layer() -> None:
    for layer in KAN((4, 8, 2), num_grids=5, grid_range=(-1.0, 3.0), width=0.7):
        assert layer.grid.tolist() == [-1, 0, 1, 2, 3] and layer.width == 0.7


def test_sides_of_inception_branches() -> None:
    layer = InceptionDWConv2d(16, square_kernel_size=5, band_kernel_size=7, branch_ratio=0.25)
    found = [layer.dwconv_hw, layer.dwconv_w, layer.dwconv_h]
    assert [conv.kernel_size for conv in found] == [(5, 5), (1, 7), (7, 1)]
    assert [conv.out_channels for conv in found] == [4] * 3
    assert layer(torch.randn(1, 16, 6, 9)).shape == (1, 16, 6, 9)


def test_heads_of_convolutions() -> None:
    x, head = torch.randn(2, 4, 5, 3), ConvHead(4, 6, 3, "avg", 0.0, bias=False).eval()
    assert head.proj.conv.bias is None and ConvHead(4, 6, 3, "avg", 0.0).proj.conv.bias is not None
    pooled = head.proj(x).mean((2, 3))
    torch.testing.assert_close(head(x, pre_logits=True), pooled)
    torch.testing.assert_close(head(x), head.fc(pooled))
    head.reset(5, "catavgmax")
    assert head(x).shape == (2, 5) and head(x, pre_logits=True).shape == (2, 12)
    head.reset(0, "")
    assert torch.equal(head(x), x)
    with pytest.raises(ValueError, match="3 classes need a pooling"):
        head.reset(3)


@pytest.mark.parametrize("stride", [1, 2])
def test_shortcuts_of_inverted_bottlenecks(stride: int) -> None:
    """Where the shape stays."""
    torch.manual_seed(0)
    for out_dim, expansion in ((4, 3), (4, 1), (6, 3)):
        layer, x = MBConv(4, out_dim, 3, expansion, stride).eval(), torch.randn(1, 4, 5, 6)
        plain = layer.project(layer.dwconv(layer.expand(x)))
        stays = stride == 1 and out_dim == 4
        torch.testing.assert_close(layer(x), x + plain if stays else plain)
        assert isinstance(layer.expand, nn.Identity) == (expansion == 1)
    assert isinstance(ConvFFN(4, 8).act, nn.ReLU)
