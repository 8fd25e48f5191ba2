"""ViG beyond the contract: both averages, networks of one resolution, dense maps, kernels."""

from __future__ import annotations

import pytest
import torch
from published import load_published
from zoo import randomise, small

import backbones
from backbones.cli.parity import checkpoint, image, relative_error
from backbones.vig.blocks import GatedLinearAttention, JoinedAttention


@pytest.mark.parametrize(
    ("variant", "number"),
    [("vig_t", 0), *(pytest.param(f"vig_{v}", 1, marks=pytest.mark.slow) for v in "tsb")],
)
@torch.no_grad()
def test_mean_of_directions(variant, number):
    """As training computes it; the published evaluation halves it once more."""
    model, figures = load_published("vig", variant, mean_of_directions=True, drop_path_rate=0.0)
    case = figures["cases"][number]
    x = image(case["input"], case["seed"])
    assert relative_error(model(x), case["logits_mean_of_directions"]) <= 1e-5
    assert relative_error(model(x), case["logits"]) > 1e-3
    published = backbones.create_model(variant, drop_path_rate=0.0)
    backbones.load_checkpoint(published, checkpoint(figures))
    assert relative_error(published.train()(x), case["logits_mean_of_directions"]) <= 1e-5


@torch.inference_mode()
def test_the_norm_of_the_hierarchical_stem_applies_the_activation():
    fused = backbones.fuse(randomise(small("vig")).eval())
    first = [call.kernel for call in backbones.explain(fused, 64, repeats=1).calls[:4]]
    assert "layer_norm" in first and "gelu" not in first


@pytest.mark.parametrize("act", [False, True])
@torch.no_grad()
def test_projections_joined(act):
    torch.manual_seed(0)
    attn = randomise(GatedLinearAttention(24, 3, act, eval_share=0.25)).double().eval()
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64)
    expected = attn(x)
    joined = attn.fuse()
    assert isinstance(joined, JoinedAttention)
    torch.testing.assert_close(joined(x), expected, rtol=1e-10, atol=1e-10)
