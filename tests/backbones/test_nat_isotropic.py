"""Isotropic NAT, DiNAT and ViT-rpb: every block, the bias of the whole map, other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import assert_maps, load_published
from torch import Tensor, nn
from zoo import images, outlines, randomise

import backbones
from backbones.cli.parity import checkpoint, reference, variants
from backbones.nat_isotropic import NATIsotropic
from ops.neighborhood.block import MapAttention

VARIANTS = [variant for family, variant in variants() if family == "nat_isotropic"]
SHALLOW: dict[str, Any] = {"dim": 16, "depths": (1, 1, 1, 1), "num_heads": 2, "num_classes": 10}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=() if v == "vitrpb_small" else (pytest.mark.slow,))
        for v in VARIANTS
        if v.endswith("small")
    ],
)
@torch.no_grad()
def test_every_block(variant):
    model, figures = load_published("nat_isotropic", variant)
    case = figures["cases"][1]
    assert_maps(model, case, 1e-5, case["block_outputs"])


def dilations_of(model: Any) -> list[int]:
    return [block.attn.dilation[0] for stage in model.stages for block in stage.blocks]


def test_dilations_in_turn():
    with outlines():
        assert dilations_of(NATIsotropic(dilations=3, **SHALLOW)) == [3] * 4
        assert dilations_of(NATIsotropic(dilations=(1, 2, 5), **SHALLOW)) == [1, 2, 5, 1]


def test_index_buffers_are_ignored():
    figures = reference("nat_isotropic", "vitrpb_small")
    tensors = checkpoint(figures)
    indices = [name for name, _, dtype in figures["state_dict"] if "int64" in dtype]
    assert len(indices) == 12
    tensors |= {name: torch.zeros(196, 196, dtype=torch.int64) for name in indices}
    report = backbones.load_checkpoint(backbones.create_model("vitrpb_small"), tensors)
    assert not (report.missing or report.unexpected)


def naive(layer: MapAttention, x: Tensor) -> Tensor:
    """Attention to the whole map, with the bias of each offset."""
    _, height, width, _ = x.shape
    query, key, value = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    down = rows[None] - rows[:, None] + height - 1  # of keys seen from queries
    right = columns[None] - columns[:, None] + width - 1
    rpb = layer.window((height, width))[3]
    assert rpb is not None
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * layer.scale + rpb[:, down, right]
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)
    return layer.proj(out.flatten(2)).view(x.shape)


@pytest.mark.parametrize("size", [(6, 6), (6, 9), (3, 4), (1, 1)])
def test_the_whole_map(size):
    torch.manual_seed(0)
    layer = MapAttention(8, 2, 6).double()
    nn.init.normal_(layer.rpb)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x))
    rpb = layer.window(size)[3]
    assert rpb is not None and rpb.shape == (2, 2 * size[0] - 1, 2 * size[1] - 1)
    assert (rpb is layer.rpb) == (size == (6, 6))


@torch.no_grad()
def test_a_bias_for_another_map_is_that_of_the_interpolation():
    """What a checkpoint's table becomes, and what a model makes of its own, are the same."""
    model = randomise(NATIsotropic(kernel_size=None, map_size=6, **SHALLOW)).eval()
    other = NATIsotropic(kernel_size=None, map_size=4, **SHALLOW).eval()
    report = backbones.load_checkpoint(other, model.state_dict())
    assert len(report.resized) == 4
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(other(x), model(x))
