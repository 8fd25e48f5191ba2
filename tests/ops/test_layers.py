"""Layers that families share, against their definitions; options; fused forms; bad arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_with_gradients
from compiled_kernels import random
from torch import Tensor, nn
from zoo import images, randomise

from backbones.efficientvit import Block
from ops.conv import ConvNorm, ConvResidual, NormConv, NormLinear
from ops.kan import KAN, KANLayer
from ops.large_kernel import DilatedReparamConv2d, merge_dilated_kernels
from ops.mlp import DWMlp
from ops.mobile import MBConv, Residual
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import NeighborhoodBlock
from ops.patch import PatchEmbed, PatchMerging
from ops.position import ConvPosition, resize_position_table
from ops.pyramid import SimplePyramid


# ---- convolutions --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (ConvNorm(4, 6, 5, 2, dilation=3), nn.Conv2d),
        (ConvNorm(4, 6, 5, act_layer=nn.ReLU), nn.Sequential),
        (ConvResidual(4, 3), nn.Conv2d),
        (ConvPosition(4, 1), nn.Conv2d),
        (ConvPosition(4, 5), nn.Conv2d),
        (NormLinear(4, 3), nn.Linear),
        (NormConv(4, 6), nn.Conv2d),
        *((DilatedReparamConv2d(4, side), nn.Conv2d) for side in (5, 7, 9, 11, 13, 15, 17)),
    ],
)
@torch.no_grad()
def test_layers_fuse_into_one(layer: nn.Module, kind: type[nn.Module]) -> None:
    """And stay as they were."""
    torch.manual_seed(0)
    randomise(layer).double().eval()
    x = torch.randn(2, 4, *([] if kind is nn.Linear else [12, 14]), dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    expected, fused = layer(x), layer.fuse()
    assert type(fused) is kind
    torch.testing.assert_close(fused(x), expected)
    torch.testing.assert_close(layer.state_dict(), before)


# ---- large kernels -------------------------------------------------------------------------------
def depthwise(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    reach = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, None, 1, reach, dilation, groups=len(weight))


@pytest.mark.parametrize("branches", [[(5, 3)], [(1, 1), (3, 2)], [(5, 1), (3, 1), (5, 2), (1, 3)]])
def test_merged_kernel_is_the_sum_with_its_gradients(branches: list[tuple[int, int]]) -> None:
    x, dilations = random(2, 3, 7, 9), [dilation for _, dilation in branches]
    weights = [random(3, 1, k, k, seed=i).requires_grad_() for i, (k, _) in enumerate(branches)]
    merged = F.conv2d(x, merge_dilated_kernels(weights, dilations, 13), padding=6, groups=3)
    expected = sum(depthwise(x, w, d) for w, d in zip(weights, dilations, strict=True))
    assert_same_with_gradients(merged, expected, weights)


# ---- depthwise MLPs ------------------------------------------------------------------------------
# ---- patches -------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "side"),
    [(PatchMerging(3, 12), 2), (PatchEmbed(3, 8, 4), 4), (PatchEmbed(3, 8, 16), 16)],
)
@pytest.mark.parametrize("size", [(5, 6), (6, 5), (7, 3), (1, 1), (33, 47)])
def test_patches_are_completed_with_zeros(
    size: tuple[int, int], side: int, layer: nn.Module
) -> None:
    x = images(2, 3, *size)
    out = layer(x)
    assert out.shape[2:] == (-(-size[0] // side), -(-size[1] // side))
    torch.testing.assert_close(out, layer(F.pad(x, (0, -size[1] % side, 0, -size[0] % side))))


def test_merging_of_dynamic_sizes() -> None:
    torch._dynamo.reset()
    layer = PatchMerging(4, 8).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((4, 6), (5, 8), (7, 9)):
        x = images(1, 4, *size)
        torch.testing.assert_close(compiled(x), layer(x))


# ---- positions -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(8, 8), (2, 8), (3, 1)])
@torch.no_grad()
def test_a_table_is_interpolated(size: tuple[int, int]) -> None:
    """Also where another shape has as many pixels."""
    torch.manual_seed(0)
    table = torch.randn(1, 16, 3)
    square = table.reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size, mode="bicubic", align_corners=False, antialias=False)
    resized = resize_position_table(table, size)
    torch.testing.assert_close(resized, expected.flatten(2).transpose(1, 2))
    half = resize_position_table(table.bfloat16(), size)
    assert half.dtype == torch.bfloat16
    exact = resize_position_table(table.bfloat16().float(), size)
    assert torch.equal(half, exact.bfloat16())


# ---- the pyramid of one map ----------------------------------------------------------------------
@torch.no_grad()
def test_levels_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    pyramid = SimplePyramid(16)
    x = torch.randn(2, 16, 6, 5)
    maps = pyramid(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 24, 20), (8, 12, 10), (16, 6, 5), (16, 3, 3)]
    assert tuple(m.shape[1] for m in maps) == pyramid.channels
    first, norm, _, second = pyramid[0]
    middle = F.layer_norm(first(x).permute(0, 2, 3, 1), (8,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(maps[0], second(F.gelu(middle).permute(0, 3, 1, 2)))
    torch.testing.assert_close(maps[1], F.conv_transpose2d(x, *pyramid[1].parameters(), stride=2))
    assert torch.equal(maps[2], x)
    assert torch.equal(maps[3][:, :, :, :2], F.max_pool2d(x, 2))
    chosen = pyramid(x, [1, 3])
    assert torch.equal(chosen[0], maps[1]) and torch.equal(chosen[1], maps[3])


# ---- Kolmogorov-Arnold layers --------------------------------------------------------------------
def test_layer_is_its_formula_with_its_gradients() -> None:
    torch.manual_seed(0)
    layer = KANLayer(3, 4, num_grids=5, grid_range=(-1, 2), width=0.5).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    normed = layer.norm(x)
    weight = layer.linear.weight.view(4, 3, 5)
    expected = torch.zeros(2, 6, 4, dtype=torch.float64)
    for place, point in enumerate((-1, -0.25, 0.5, 1.25, 2)):
        bump = torch.cosh((normed - point) / 0.5) ** -2
        expected = expected + bump @ weight[:, :, place].T
    tensors = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert_same_with_gradients(layer(x), expected, tensors)


# ---- options have their effect -------------------------------------------------------------------
def _block(drop: float, drop_path: float) -> NeighborhoodBlock:
    return NeighborhoodBlock(NeighborhoodAttention2D(4, 2, 3), 2.0, drop, drop_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: ConvResidual(4, drop_path=rate, norm_scale=1.0),
        lambda rate: Residual(nn.Linear(4, 4), rate),
        lambda rate: MBConv(4, 4, 3, 2, drop_path=rate),
        lambda rate: _block(0.0, rate),
        lambda rate: Block(4, nn.Linear(4, 4), rate),
    ],
)
def test_a_branch_that_is_always_dropped(make: Callable[[float], nn.Module]) -> None:
    x = torch.randn(2, 4, 4, 4)
    layer = make(1.0).train()
    assert torch.equal(layer(x), x)
    assert not torch.equal(layer.eval()(x), x)
    assert not torch.equal(make(0.0).train()(x), x)


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
    kan = KAN((4, 8, 2), num_grids=5, grid_range=(-1.0, 3.0), width=0.7)
    for layer in kan:
        assert layer.grid.tolist() == [-1, 0, 1, 2, 3] and layer.width == 0.7
        assert not layer.grid.requires_grad
    assert kan(torch.zeros(3, 5, 4)).shape == (3, 5, 2)
    torch.testing.assert_close(KAN((2, 2), num_grids=9)[0].grid, torch.arange(-2, 2.5, 0.5))
