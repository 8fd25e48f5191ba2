"""RAVLT: dense networks, angles, initial weights, weight decay, half precision."""

from __future__ import annotations

import pytest
import torch
from published import assert_maps, dense_weights, load_whole
from timm.optim import param_groups_weight_decay
from torch import nn
from zoo import images, randomise

import backbones
from backbones.cli.parity import checkpoint, reference, tolerance

TOLERANCE = tolerance("ravlt")
SHALLOW = {"depths": (1, 1, 1, 1)}
VARIANTS = [f"ravlt_{size}" for size in "tsbl"]


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.slow if v[-1] in "bl" else ()) for v in VARIANTS]
)
@torch.no_grad()
def test_dense_networks(variant):
    figures = reference("ravlt", variant)
    model = backbones.create_model(variant, out_norms=True, num_classes=0).eval()
    load_whole(model, dense_weights(figures))
    for case in figures["dense_cases"]:
        assert_maps(model, case, TOLERANCE)


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


def test_classifiers_weights_serve_dense_networks():
    model = backbones.create_model("ravlt_t", out_norms=True, num_classes=0)
    weights = checkpoint(reference("ravlt", "ravlt_t"))
    report = backbones.load_checkpoint(model, weights, strict=False)
    assert all(name.startswith("out_norms.") for name in report.missing)
    assert all(name.startswith("head.proj.") for name in report.unexpected)
    for norm in model.out_norms.values():
        assert norm.eps == 1e-6
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()


@torch.no_grad()
def test_dense_network_becomes_a_classifier():
    model = backbones.create_model("ravlt_t", out_norms=True, num_classes=0, **SHALLOW).eval()
    assert model(images(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    with pytest.raises(ValueError, match="5 classes need a pooling"):
        model.reset_classifier(5)
    model.reset_classifier(5, "avg")
    assert model(images(1, 3, 64, 64)).shape == (1, 5)
    assert backbones.create_model("ravlt_t", num_classes=0, **SHALLOW).head_hidden_size == 1024


@pytest.mark.parametrize(
    ("variant", "scales", "rate"),
    [
        ("ravlt_t", (1, 1, 1, 1), 0.1),
        ("ravlt_s", (1, 1, 1, 1), 0.15),
        ("ravlt_b", (1, 1, 1e-6, 1e-6), 0.4),
        ("ravlt_l", (1e-6, 1e-6, 1e-6, 1e-6), 0.55),
    ],
)
def test_scales_and_drop_path(variant, scales, rate):
    depths = [1, 2, 2, 1]
    model = backbones.create_model(variant, depths=depths)
    rates = []
    for stage, scale in zip(model.stages, scales, strict=True):
        for block in stage.blocks:
            rates.append(block.drop_path.drop_prob)
            for gamma in (block.gamma1, block.gamma2):
                assert bool((gamma == scale).all())
    assert rates == pytest.approx([rate * b / 5 for b in range(6)])


def test_initial_weights_and_weight_decay():
    torch.manual_seed(0)
    model = backbones.create_model("ravlt_t", **SHALLOW)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            count = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(0.02, rel=4 * count**-0.5), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
    spared, decayed = param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay()
    )
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(p.ndim == 1 for p in spared["params"])
    in_decay = {names[id(p)] for p in decayed["params"]}
    assert {n for n in names.values() if "gamma" in n} <= in_decay


@torch.no_grad()
def test_autocast():
    model = randomise(backbones.create_model("ravlt_t", **SHALLOW)).eval()
    x = images(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x).float()
    exact = model(x)
    assert ((out - exact).abs().max() / exact.abs().max()).item() < 0.1


def test_softmax_attention_everywhere():
    plain = backbones.create_model("ravlt_t", linear=(False,) * 4, **SHALLOW)
    mixed = backbones.create_model("ravlt_t", **SHALLOW)
    assert plain.state_dict().keys() == mixed.state_dict().keys()
    assert not any(getattr(m, "linear", False) for m in plain.modules())
