"""RAVLT: dense networks, angles, weight decay, half precision."""

from __future__ import annotations

import pytest
import torch
from zoo import images, randomise

import backbones
from backbones.cli.parity import checkpoint, reference
from ops.cpu import policy

SHALLOW = {"depths": (1, 1, 1, 1)}


@torch.no_grad()
def test_stored_angles_are_optional():
    figures = reference("ravlt", "ravlt_t")
    without = checkpoint(figures)
    stored = {name: torch.full((32,), torch.nan) for name in figures["derived"]}
    assert stored
    outputs = []
    for tensors in (without, {**without, **stored}):
        model = backbones.create_model("ravlt_t").eval()
        report = backbones.load_checkpoint(model, {"model": {}, "model_ema": tensors})
        assert not (report.missing or report.unexpected)
        outputs.append(model(images(1, 3, 32, 32)))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_dense_network_becomes_a_classifier():
    model = backbones.create_model("ravlt_t", out_norms=True, num_classes=0, **SHALLOW).eval()
    assert model(images(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    with pytest.raises(ValueError, match="num_classes must be 0, got 5"):
        model.reset_classifier(5)
    model.reset_classifier(5, "avg")
    assert model(images(1, 3, 64, 64)).shape == (1, 5)
    assert backbones.create_model("ravlt_t", num_classes=0, **SHALLOW).head_hidden_size == 1024


@torch.inference_mode()
def test_large_maps_in_bfloat16_are_replayed(monkeypatch: pytest.MonkeyPatch):
    """Whose softmax attention is left to torch."""
    model = randomise(backbones.create_model("ravlt_t", **SHALLOW)).eval()
    x = images(1, 3, 64, 64)
    exact = model(x)
    monkeypatch.setattr(policy, "rotated_attention_by_kernel", lambda tokens, dtype: False)
    fused = model.fuse(torch.bfloat16)
    for _ in range(3):
        out = fused(x.bfloat16())
    assert fused.is_replayed
    assert ((out - exact).abs().max() / exact.abs().max()).item() < 0.1


def test_softmax_attention_everywhere():
    plain = backbones.create_model("ravlt_t", linear=(False,) * 4, **SHALLOW)
    mixed = backbones.create_model("ravlt_t", **SHALLOW)
    assert plain.state_dict().keys() == mixed.state_dict().keys()
    assert not any(getattr(m, "linear", False) for m in plain.modules())
