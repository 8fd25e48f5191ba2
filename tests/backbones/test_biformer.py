"""BiFormer: other region counts, dense networks, padding, initial weights."""

from __future__ import annotations

import pytest
import torch
from published import assert_maps, dense_weights, load_published, load_whole
from torch import nn
from zoo import images, randomise

import backbones
from backbones.cli.parity import checkpoint, image, reference, relative_error, tolerance

TOLERANCE = tolerance("biformer")
SHALLOW = {"depths": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("variant", "number"),
    [
        ("biformer_tiny", 2),
        *(
            pytest.param(f"biformer_{size}", number, marks=pytest.mark.slow)
            for size in ("tiny", "small", "base")
            for number in (0, 1, 2)
            if (size, number) != ("tiny", 2)
        ),
    ],
)
@torch.no_grad()
def test_dense_networks(variant, number):
    """Output norms, padded maps and (case 2) ``n_win=8``."""
    figures = reference("biformer", variant)
    case = figures["cases"][number]
    kwargs = {key: value for key, value in case.get("kwargs", {}).items() if key == "n_win"}
    model = backbones.create_model(variant, out_norms=True, num_classes=0, **kwargs).eval()
    load_whole(model, dense_weights(figures))
    assert_maps(model, case, TOLERANCE)


@torch.no_grad()
def test_n_win_of_a_classifier():
    model, figures = load_published("biformer", "biformer_tiny", n_win=8)
    case = figures["cases"][2]
    assert case["kwargs"] == {"auto_pad": True, "n_win": 8}
    logits = model(image(case["input"], case["seed"]))
    assert relative_error(logits, case["logits"]) <= TOLERANCE


@torch.no_grad()
def test_second_form_at_an_awkward_size():
    model, figures = load_published("biformer", "biformer_stl_nchw")
    case = figures["cases"][2]
    assert case["input"] == [1, 3, 250, 330]
    logits = model(image(case["input"], case["seed"]))
    assert relative_error(logits, case["logits"]) <= TOLERANCE


def test_classifiers_weights_serve_dense_networks():
    model = backbones.create_model("biformer_tiny", out_norms=True, num_classes=0)
    weights = checkpoint(reference("biformer", "biformer_tiny"))
    report = backbones.load_checkpoint(model, weights)
    assert all(name.startswith("out_norms.") for name in report.reinitialised)
    assert all(name.startswith(("norm.", "head.fc.")) for name in report.ignored)


@torch.no_grad()
def test_out_norms_are_beside_the_trunk():
    torch.manual_seed(0)
    model = backbones.create_model("biformer_tiny", out_norms=(0, 3), **SHALLOW).eval()
    plain = backbones.create_model("biformer_tiny", **SHALLOW).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(model(x), plain(x))
    raw = plain.forward_intermediates(x, intermediates_only=True)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for stage in (0, 3):
        spread, mean = torch.var_mean(raw[stage], dim=1, keepdim=True, correction=0)
        torch.testing.assert_close(maps[stage], (raw[stage] - mean) * (spread + 1e-6).rsqrt())
    for stage in (1, 2):
        assert torch.equal(maps[stage], raw[stage])


@pytest.mark.parametrize("variant", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [(32, 32), (40, 104)])
@torch.no_grad()
def test_maps_below_the_number_of_regions(variant, size):
    torch.manual_seed(0)
    model = randomise(backbones.create_model(variant, **SHALLOW)).eval()
    x = images(2, 3, *size)
    out = model(x)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1:], model(x[1:]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_of_all_tokens_in_every_stage():
    """As many regions as there are is what ``topks=None`` means, but for scale and projections."""
    model = backbones.create_model("biformer_tiny", topks=(None,) * 4, **SHALLOW).eval()
    assert not any(type(m).__name__ == "BiLevelRoutingAttention" for m in model.modules())
    assert model(images(1, 3, 64, 64)).isfinite().all()
    many = backbones.create_model("biformer_tiny", topks=(49, 50, 999, None), **SHALLOW).eval()
    all_of_them = backbones.create_model("biformer_tiny", topks=(49, 49, 49, None), **SHALLOW)
    all_of_them.load_state_dict(many.state_dict())
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(many(x), all_of_them.eval()(x))


@pytest.mark.parametrize("variant", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_initial_weights(variant):
    torch.manual_seed(0)
    model = backbones.create_model(variant, **SHALLOW)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (variant != "biformer_stl_nchw" or "head" in name):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()  # PyTorch's uniform within ±fan_in^-0.5
            assert module.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
    assert not model.no_weight_decay()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dims must be multiples of head_dim 7"):
        backbones.create_model("biformer_tiny", dims=(60, 128, 256, 512), head_dim=7)
    with pytest.raises(ValueError, match="num_heads must divide dim 100, got 8"):
        backbones.create_model("biformer_tiny", dims=(64, 128, 256, 100))
    with pytest.raises(ValueError, match="n_win must be in 1 … 1024, got 0"):
        backbones.create_model("biformer_tiny", n_win=0)
    with pytest.raises(ValueError, match="out_norms"):
        backbones.create_model("biformer_tiny", out_norms=(4,))
