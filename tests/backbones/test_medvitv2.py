"""MedViTV2 beyond the contract: double precision, dilation, small maps, unused parameters."""

from __future__ import annotations

import pytest
import torch
from zoo import images, randomise

import backbones
from backbones.cli.parity import checkpoint, image, reference, relative_error, summary_error
from backbones.medvitv2.blocks import LocalBlock

SHALLOW = {"depths": (1, 2, 3, 1)}


@pytest.mark.parametrize(
    "variant",
    ["medvitv2_tiny"]
    + [pytest.param(f"medvitv2_{v}", marks=pytest.mark.slow) for v in ("small", "base", "large")],
)
@torch.no_grad()
def test_double_precision(variant):
    """Weights that leave single precision no digit: the meaning alone is compared."""
    figures = {k: v for k, v in reference("medvitv2", variant).items() if k != "synth_scale"}
    model = backbones.create_model(variant).eval()
    backbones.load_checkpoint(model, checkpoint(figures))
    model.double()
    for case in figures["cases_f64"]:
        last, maps = model.forward_intermediates(image(case["input"], case["seed"]).double())
        assert relative_error(model.forward_head(last), case["logits"]) < 1e-9
        for value, expected in zip(maps, case["features"], strict=True):
            assert summary_error(value, expected) < 1e-9


def test_grids_of_checkpoints():
    """Published files hold the KANs' grids; the figures' do not, since they are constants."""
    figures = reference("medvitv2", "medvitv2_tiny")
    names = figures["derived"]
    model = backbones.create_model("medvitv2_tiny")
    backbones.load_checkpoint(model, checkpoint(figures))
    grid = model.stages[3].blocks[0].kan[0].grid
    torch.testing.assert_close(grid, torch.linspace(-2, 2, 8), rtol=0, atol=0)
    held = checkpoint(figures) | {name: torch.full((8,), 0.5) for name in names}
    backbones.load_checkpoint(model, held)
    assert (grid == 0.5).all()
    # Another model's file is still refused.
    with pytest.raises(backbones.CheckpointError):
        backbones.load_checkpoint(model, {"conv1.weight": torch.zeros(64, 3, 7, 7)}, strict=False)


def test_stochastic_depth_of_attention_and_convolution():
    """Shared out like the channels, of which three quarters are for attention."""
    model = backbones.create_model("medvitv2_tiny", drop_path_rate=0.4, **SHALLOW)
    rates = [m.drop_prob for m in model.stages[-1].modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.3, 0.1, 0.4])


def test_unused_parameters():
    model = randomise(backbones.create_model("medvitv2_tiny", **SHALLOW)).train()
    unused = [n for n, _ in model.named_parameters() if ".unused." in n]
    assert unused
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {n.rsplit(".", 1)[-1] for n in frozen if n not in unused} == {"grid"}
    assert {*unused} <= {*frozen}
    assert not any(".unused." in n for n, _ in model.eval().fuse().named_parameters())


@torch.no_grad()
def test_dilation_of_each_stage():
    model = backbones.create_model("medvitv2_tiny", dilation=(4, 2, 1, 1), **SHALLOW).eval()
    found = [
        block.attn.dilation
        for stage in model.stages
        for block in stage.blocks
        if isinstance(block, LocalBlock)
    ]
    assert found == [(4, 4), (2, 2), (1, 1), (1, 1)]
    plain = backbones.create_model("medvitv2_tiny", **SHALLOW).eval()
    randomise(plain)
    model.load_state_dict(plain.state_dict())
    x = images(1, 3, 128, 128)
    dilated, undilated = model.forward_features(x), plain.forward_features(x)
    assert dilated.shape == undilated.shape
    assert not torch.allclose(dilated, undilated)
