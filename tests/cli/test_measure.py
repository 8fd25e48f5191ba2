"""Costs and receptive fields of a model's parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from zoo import outlines, small

import backbones
from backbones.cli import parity
from backbones.cli.main import main
from backbones.cli.measure import count_macs, measure
from backbones.overlock.blocks import ChannelAffine, ContextMixing
from ops.neighborhood import NeighborhoodAttention2D

# At least one of each family, and of each kind of work that an original alone does.
QUICK = {
    *("biformer_tiny", "efficientvit_m0", "favit_b0", "hat_s_x2", "inception_next_atto"),
    *("litv2_s", "medvitv2_tiny", "ravlt_t", "shvit_s1", "unireplknet_a", "van_b0"),
    *("nat_mini", "dinat_s_tiny", "vitrpb_small", "dinat_large", "overlock_xt", "vmamba_tiny_s1l8"),
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(*pair, marks=() if pair[1] in QUICK else pytest.mark.slow, id=pair[1])
        for pair in parity.variants()
    ],
)
def test_macs_and_params_are_those_of_the_original(family, variant):
    figures = parity.reference(family, variant)
    height, width = figures.get("macs_input", figures["cases"][0]["input"])[2:]
    with outlines():
        model = backbones.create_model(variant)
    parts = measure(model, height, width)
    macs = sum(part.macs for part in parts) + work_of_the_original_alone(model, height, width)
    assert macs == figures["macs"] + figures.get("macs_na2d_av", 0)
    assert sum(part.params for part in parts) == figures["params"]


@torch.no_grad()
def work_of_the_original_alone(model: nn.Module, height: int, width: int) -> int:
    """Multiply-accumulates of the original for one image that our layers do without."""
    counts: list[int] = []
    for module in model.eval().modules():
        for kind, count in _ALONE.items():
            if isinstance(module, kind):
                module.register_forward_hook(lambda *call, count=count: counts.append(count(*call)))
    model(torch.empty(1, 3, height, width, device="meta"))
    return sum(counts)


def _projections_of_padding(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """NATTEN pads a map before it projects it, our layer the projected map."""
    *size, dim = output.shape[1:]
    qkv = output.new_empty(1, *size, 3 * dim)
    return (math.prod(layer.pad(qkv).shape[1:3]) - math.prod(size)) * 3 * dim**2


def _scales(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """OverLoCK's scale and shift are a depthwise 1×1 convolution."""
    return output.numel()


def _affinities(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """OverLoCK maps affinities to 49 keys to the taps; we map the keys."""
    positions, keys, taps = output.shape[2] * output.shape[3], 7 * 7, len(layer.tap_bias)
    heads, head_dim = layer.num_heads, output.shape[1] // (2 * layer.num_heads)
    theirs = positions * keys * (head_dim + taps)
    ours = (keys + positions) * head_dim * taps
    return heads * (theirs - ours)


_ALONE: dict[type[nn.Module], Callable[..., int]] = {
    NeighborhoodAttention2D: _projections_of_padding,
    ChannelAffine: _scales,
    ContextMixing: _affinities,
}


def test_macs_of_neighborhood_attention_are_those_of_its_window():
    # Backends work on tiles, which would count several times as much.
    model = small("medvitv2", depths=(1, 1, 1, 1))
    attn = model.stages[0].blocks[0].attn
    before = count_macs(model, 64, 64)
    model.stages[0].blocks[0].attn = nn.Identity()
    tokens, dim = 16 * 16, attn.embed_dim
    assert before - count_macs(model, 64, 64) == tokens * (4 * dim * dim + 2 * 49 * dim)


def test_macs_of_global_attention_grow_with_the_square_of_the_map():
    """Also beyond the size that its position bias is for, 14 × 14."""
    with outlines():
        model = backbones.create_model("vitrpb_small")
    stages = [[p.macs for p in measure(model, n, n) if p.name[:5] == "stage"] for n in (224, 448)]
    quadratic = sum(stages[1]) - 4 * sum(stages[0])
    assert quadratic == 12 * 2 * 384 * (28**4 - 4 * 14**4)


def test_macs_of_a_query_that_is_a_parameter():
    """As in the attention pooling of SigLIP: a view of a parameter is the input of a layer."""
    arguments = {"global_pool": "map", "class_token": False, "img_size": 32, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    assert count_macs(model, 32, 32) > 0


def test_shapes_and_shares():
    model = small("van").eval()
    parts = measure(model, 64, 96, runs=2)
    assert [part.name for part in parts] == ["stem", *(f"stage {i}" for i in range(1, 5)), "head"]
    assert parts[1].shape == (32, 16, 24)
    assert parts[-1].shape == (1000,)
    assert sum(part.share or 0 for part in parts) == pytest.approx(1)
    assert all(part.share is not None and part.share > 0 for part in parts)


@pytest.mark.parametrize("family", ["inception_next", "van", "unireplknet"])
def test_receptive_field_is_where_gradients_reach(family):
    # Positive weights, so that nothing cancels. Squeeze-and-excitation and response norms, which
    # see everything, are taken out.
    model = small(family, depths=(1, 1, 1, 1)).double().eval()
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ in ("SEModule", "GlobalResponseNorm", "LayerNorm2d"):
                setattr(module, name, nn.Identity())
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    fields = [part.receptive_field for part in measure(model, 224, 224)[1:3]]
    size = 512
    images = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    for stage, field in enumerate(fields):
        (features,) = model.forward_intermediates(images, [stage], intermediates_only=True)
        centre = features.shape[2] // 2
        (gradient,) = torch.autograd.grad(features[0, :, centre, centre].sum(), images)
        rows = gradient[0].abs().sum((0, 2)).nonzero()
        assert rows.max() - rows.min() + 1 == field


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(
    ("family", "stem"), [("ravlt", 15), ("vig", 7), ("vmamba", 7), ("vrwkv", 16)]
)
def test_attention_and_scans_see_everything(family, stem, is_fused):
    model = small(family).eval()
    fields = [part.receptive_field for part in measure(model.fuse() if is_fused else model, 64, 64)]
    assert fields[0] == stem
    assert fields[1:5] == [math.inf] * 4
    assert fields[5] is None


def test_a_fused_model_has_fewer_parameters(capsys):
    totals = []
    for more in ([], ["--fused"]):
        assert main(["summary", "shvit_s1", "--runs", "0", *more]) == 0
        out = capsys.readouterr().out
        totals += [ln for ln in out.splitlines() if ln.startswith("total")]
        assert "%" not in out  # no shares of the time
    assert len(totals) == 2 and totals[0] != totals[1]
