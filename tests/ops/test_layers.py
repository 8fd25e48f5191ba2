"""Layers that families share, against their definitions; options; fused forms; bad arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_with_gradients
from compiled_kernels import random
from timm.models.swin_transformer import PatchMerging as TimmPatchMerging
from torch import Tensor, nn
from zoo import images, randomise

from backbones.cli.parity import checkpoint, reference, relative_error, uniform
from ops.conv import ConvHead, ConvNorm, ConvResidual, InceptionDWConv2d, NormConv, NormLinear
from ops.kan import KAN, KANLayer
from ops.large_kernel import DilatedReparamConv2d, merge_dilated_kernels
from ops.mlp import DWMlp
from ops.mobile import ConvFFN, ExpandMerging, MBConv, MixHead, NormLinearHead, Residual, conv_stem
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import NeighborhoodBlock
from ops.patch import PatchEmbed, PatchMerging
from ops.position import ConvPosition, PositionTable, resize_position_table
from ops.pyramid import SimplePyramid


# ---- convolutions --------------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
@torch.no_grad()
def test_convolutions_keep_the_size(stride: int, dilation: int) -> None:
    layer = ConvNorm(4, 6, 5, stride, dilation=dilation)
    assert layer(torch.randn(2, 4, 17, 20)).shape == (2, 6, -(-17 // stride), -(-20 // stride))


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


@pytest.mark.parametrize("layer", [ConvResidual(4, 3), Residual(ConvFFN(4, 8))])
@torch.no_grad()
def test_residuals_start_as_the_identity(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(("square", "band", "ratio"), [(3, 11, 0.125), (5, 7, 0.25)])
@torch.no_grad()
def test_inception_branches_are_those_of_the_paper(square: int, band: int, ratio: float) -> None:
    layer, x = InceptionDWConv2d(16, square, band, ratio).double(), random(2, 16, 9, 13)
    width = int(16 * ratio)
    expected = list(x.split([16 - 3 * width, width, width, width], dim=1))
    sides = [(square, square), (1, band), (band, 1)]
    for i, conv in enumerate((layer.dwconv_hw, layer.dwconv_w, layer.dwconv_h)):
        padding = [side // 2 for side in sides[i]]
        weight = conv.weight.view(width, 1, *sides[i])
        expected[i + 1] = F.conv2d(expected[i + 1], weight, conv.bias, 1, padding, 1, width)
    torch.testing.assert_close(layer(x), torch.cat(expected, dim=1))


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


@torch.no_grad()
def test_small_kernels_are_added_to_the_large_one() -> None:
    layer, x = randomise(DilatedReparamConv2d(4, 13)).double().eval(), random(2, 4, 8, 11)
    expected = layer.large(x)
    for branch in layer.branches.values():
        expected += branch.norm(depthwise(x, branch.conv.weight, branch.conv.dilation[0]))
    torch.testing.assert_close(layer(x), expected)


# ---- depthwise MLPs ------------------------------------------------------------------------------
def test_definition() -> None:
    mlp, x = DWMlp(4, 6).double(), random(2, 3, 5, 4)
    near = depthwise(mlp.fc1(x).permute(0, 3, 1, 2), mlp.dwconv.weight, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(near + mlp.dwconv.bias)))


# ---- parts of the stride-16 families -------------------------------------------------------------
@torch.no_grad()
def test_stem_and_merging_round_up() -> None:
    x = torch.randn(1, 3, 33, 47)
    widths = []
    for layer in conv_stem(3, 32):
        x = layer(x)
        widths.append(tuple(x.shape[1:]))
    assert widths == [(4, 17, 24), (8, 9, 12), (16, 5, 6), (32, 3, 3)]
    assert ExpandMerging(32, 48)(x).shape == (1, 48, 2, 2)


@pytest.mark.parametrize("distilled", [False, True])
def test_head(distilled: bool) -> None:
    head = NormLinearHead(6, 5, distilled=distilled)
    x = torch.randn(3, 6, 2, 2)
    means, out = x.mean((2, 3)), head(x)
    assert [o.shape for o in (out if distilled else [out])] == [(3, 5)] * (2 if distilled else 1)
    both = [head.eval().fc(means), head.fc_dist(means) if distilled else head.fc(means)]
    torch.testing.assert_close(head(x), sum(both) / 2)
    torch.testing.assert_close(head(x, pre_logits=True), means)


# ---- patches -------------------------------------------------------------------------------------
@torch.no_grad()
def test_merging_is_that_of_swin() -> None:
    ours, theirs = PatchMerging(8, 12), TimmPatchMerging(8, 12)
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 8, 6, 10)
    expected = theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x), expected)


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


@torch.no_grad()
def test_patches_are_convolved_and_normalised() -> None:
    layer, x = PatchEmbed(3, 8, 16), images(1, 3, 32, 32)
    torch.testing.assert_close(layer(x), layer.norm(layer.conv(x)))


def test_merging_of_dynamic_sizes() -> None:
    torch._dynamo.reset()
    layer = PatchMerging(4, 8).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((4, 6), (5, 8), (7, 9)):
        x = images(1, 4, *size)
        torch.testing.assert_close(compiled(x), layer(x))


# ---- positions -----------------------------------------------------------------------------------
@torch.no_grad()
def test_a_table_is_added_row_by_row() -> None:
    torch.manual_seed(0)
    layer = PositionTable(3, 4)
    x = torch.randn(2, 3, 4, 4)
    added = layer(x) - x
    for row, column in ((0, 0), (1, 2), (3, 3)):
        vector = layer.pos_embed[0, 4 * row + column]
        torch.testing.assert_close(added[:, :, row, column], vector.expand(2, 3))
    assert resize_position_table(layer.pos_embed, (4, 4)) is layer.pos_embed
    assert PositionTable(3, 2, std=0).pos_embed.abs().max() == 0


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


def test_published_figures() -> None:
    case = reference("medvitv2", "medvitv2_tiny")["kan_case"]
    rows = [(f"kan.{name}", shape, dtype) for name, shape, dtype in case["state_dict"]]
    tensors = checkpoint({"state_dict": rows})
    kan = KAN((6, 10, 6))
    with torch.no_grad():
        for i, layer in enumerate(kan):
            layer.norm.weight.copy_(tensors[f"kan.layers.{i}.layernorm.weight"])
            layer.norm.bias.copy_(tensors[f"kan.layers.{i}.layernorm.bias"])
            layer.linear.weight.copy_(tensors[f"kan.layers.{i}.spline_linear.weight"])
        out = kan(torch.from_numpy(uniform("kan-x", (5, 6))))
    assert relative_error(out.flatten(), case["out"]) < 1e-5


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
    ],
)
def test_a_branch_that_is_always_dropped(make: Callable[[float], nn.Module]) -> None:
    x = torch.randn(2, 4, 4, 4)
    layer = make(1.0).train()
    assert torch.equal(layer(x), x)
    assert not torch.equal(layer.eval()(x), x)
    assert not torch.equal(make(0.0).train()(x), x)


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda rate: ConvHead(4, 6, 3, "avg", rate), 6),
        (lambda rate: MixHead(4, 6, 3, "avg", rate), 6),
        (lambda rate: NormLinearHead(4, 3, "avg", rate), 4),
        (lambda rate: NormLinearHead(4, 3, "avg", rate, distilled=True), 4),
    ],
)
def test_heads_drop_what_they_classify_and_are_reset(
    make: Callable[[float], Any], width: int
) -> None:
    x, head = torch.rand(3, 4, 5, 5), make(1.0).train()
    assert not head(x, pre_logits=True).any()
    assert head.eval()(x, pre_logits=True).any() and make(0.0).train()(x, pre_logits=True).any()
    assert head(x).shape == (3, 3)
    head.reset(0)
    assert torch.equal(head(x), head(x, pre_logits=True)) and head(x).shape == (3, width)
    head.reset(2, "catavgmax")
    assert head(x).shape == (3, 2) and head(x, pre_logits=True).shape == (3, 2 * width)
    head.reset(0, "")
    assert torch.equal(head(x), x)


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
    kan = KAN((4, 8, 2), num_grids=5, grid_range=(-1.0, 3.0), width=0.7)
    for layer in kan:
        assert layer.grid.tolist() == [-1, 0, 1, 2, 3] and layer.width == 0.7
        assert not layer.grid.requires_grad
    assert kan(torch.zeros(3, 5, 4)).shape == (3, 5, 2)
    torch.testing.assert_close(KAN((2, 2), num_grids=9)[0].grid, torch.arange(-2, 2.5, 0.5))


def test_heads_of_convolutions() -> None:
    x, head = torch.randn(2, 4, 5, 3), ConvHead(4, 6, 3, "avg", 0.0, bias=False).eval()
    assert head.proj.conv.bias is None and ConvHead(4, 6, 3, "avg", 0.0).proj.conv.bias is not None
    pooled = head.proj(x).mean((2, 3))
    torch.testing.assert_close(head(x, pre_logits=True), pooled)
    torch.testing.assert_close(head(x), head.fc(pooled))
    head.reset(0, "")
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
