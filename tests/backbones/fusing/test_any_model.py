"""``fuse()`` on networks of timm, torchvision and transformers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from compiled_kernels import without_kernels
from timm_models import SMALLEST, Branching, network, vit_of_transformers
from torch import Tensor, nn
from zoo import images, small

import backbones
from backbones.fusing import quantization

# Of the modules with the smallest models, those whose blocks differ most.
QUICK = (
    *("byobnet", "convnext", "edgenext", "efficientnet", "fasternet", "fastvit", "ghostnet"),
    *("hgnet", "levit", "maxxvit", "metaformer", "mobilenetv3", "mobilevit", "nfnet", "pvt_v2"),
    *("regnet", "repvit", "resnet", "vision_transformer", "xcit"),
)


def _leaves(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _error(result: Any, expected: Any) -> float:
    """The largest error relative to the largest output, over all tensors."""
    pairs = list(zip(_leaves(result), _leaves(expected), strict=True))
    assert pairs and all(a.shape == b.shape for a, b in pairs)
    return max(
        ((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-12)).item()
        for a, b in pairs
    )


def _rms_error(result: Any, expected: Any) -> float:
    """The error relative to the outputs, over all images, since that of one varies by chance."""
    a, b = (torch.cat([t.double().flatten() for t in _leaves(r)]) for r in (result, expected))
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@torch.no_grad()
def _check(model: nn.Module, x: Tensor) -> None:
    """Assert that replays differ from float64 by no more than float32 does, or 1e-5."""
    expected = copy.deepcopy(model).double()(x.double())
    bound = max(1e-5, 4 * _error(model(x), expected))
    fused = backbones.fuse(copy.deepcopy(model))
    for _ in range(5):  # some keep something in the first
        assert _error(fused(x), expected) <= bound
    assert fused.is_replayed  # type: ignore[operator]


@pytest.mark.parametrize("module", QUICK)
def test_outputs_are_equal(module: str) -> None:
    _check(*network(module))


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALLEST)
def test_outputs_are_equal_for_every_module_of_timm(module: str) -> None:
    model, x = network(module, images=4)
    _check(model, x[:1])
    half = backbones.fuse(copy.deepcopy(model), torch.bfloat16)
    with torch.no_grad():
        expected, rounded = [model(image) for image in x.split(1)], x.bfloat16().split(1)
        results = [[m(image) for image in rounded] for m in (half, model.bfloat16())]
    error, usual = (_rms_error(result, expected) for result in results)
    assert error <= max(0.02, 2 * usual)


@pytest.mark.parametrize("module", ["resnet", "vision_transformer", "convnext"])
@torch.no_grad()
def test_methods_and_lists_of_maps_are_replayed(module: str) -> None:
    model, x = network(module)
    fused: Any = backbones.fuse(copy.deepcopy(model))
    for call in (
        lambda m: m(x),
        lambda m: m.forward_features(x),
        lambda m: m.forward_intermediates(x, indices=[0, 1], norm=True),
        lambda m: m.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
    ):
        for _ in range(3):
            assert _error(call(fused), call(model)) <= 1e-5
    assert [door.name for door in fused.doors] == 4 * ["recorded"]
    _check(*network(module, features_only=True))
    _check(*network(module, num_classes=0))


@torch.no_grad()
def test_tied_weights_of_inference_mode_stay_tied() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
        model[2].weight = model[0].weight
    fused: Any = backbones.fuse(model)
    assert fused[0].weight is fused[2].weight and not fused[0].weight.is_inference()
    x, before = torch.randn(3, 8), [fused(torch.ones(3, 8)) for _ in range(4)][-1]
    fused[0].weight.mul_(2)
    assert not torch.equal(fused(torch.ones(3, 8)), before)
    wanted = F.linear(F.gelu(fused[0](x)), fused[0].weight, fused[2].bias)
    torch.testing.assert_close(fused(x), wanted)


def test_networks_that_were_training_are_evaluated() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    fused, x = backbones.fuse(model), torch.randn(4, 8)
    assert not fused.training and torch.equal(fused(x), fused(x))


def test_copies_pickles_and_names() -> None:
    model, x = network("resnet")
    fused: Any = backbones.fuse(copy.deepcopy(model))
    for _ in range(3):
        assert not fused(x).requires_grad
    assert fused.is_replayed and not any(p.requires_grad for p in fused.parameters())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for _ in range(3):
            assert _error(other(x), model(x)) <= 1e-5
        assert other.is_replayed and type(other).__name__ == type(model).__name__
        assert other.state_dict().keys() == model.state_dict().keys()
    assert backbones.fuse(fused) is fused and isinstance(fused, type(model))
    with pytest.raises(RuntimeError, match="ResNet has been fused for inference"):
        fused.train()
    fused.eval()


@torch.no_grad()
def test_a_course_that_depends_on_values_is_left_as_it_is() -> None:
    model = Branching().eval()
    fused: Any = backbones.fuse(copy.deepcopy(model))
    for sign in (1, -1, 1, -1, 1, -1):
        x = torch.full((1, 3, 64, 64), 0.5 * sign)
        assert _error(fused(x), model(x)) <= 1e-5
    assert not fused.is_replayed and fused.body.is_replayed


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_classifiers_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    _check(model, torch.randn(1, 3, 96, 96))


@torch.no_grad()
def test_a_backbone_of_transformers() -> None:
    model = vit_of_transformers()
    fused: Any = backbones.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32)
    for _ in range(5):
        assert _error(fused(pixel_values=x).last_hidden_state, model(x).last_hidden_state) <= 1e-5
    assert fused.is_replayed


def test_autocast_tracing_and_export_see_the_plain_network() -> None:
    model, x = network("resnet")
    fused = backbones.fuse(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert _error(fused(x), model(x)) == 0
        assert _error(torch.export.export(fused, (x,)).module()(x), model(x)) <= 1e-6


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@torch.no_grad()
def test_scripts_and_containers() -> None:
    model, x = network("resnet")
    assert _error(backbones.fuse(torch.jit.trace(model, x))(x), model(x)) <= 1e-5
    fused: Any = backbones.fuse(nn.Sequential(nn.Identity(), copy.deepcopy(model)).eval())
    for _ in range(3):
        assert _error(fused(x), model(x)) <= 1e-5
    assert fused.is_replayed and backbones.fuse(nn.ReLU())(x).shape == x.shape


@pytest.mark.parametrize("kind", ["a family", "resnet"])
def test_where_int8_does_not_pay(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model stays in float32, and one warning says why."""
    without_kernels(monkeypatch)
    quantization._warn_not_faster.cache_clear()
    model, x = (small("shvit").eval(), images(1, 3, 64, 64)) if kind != "resnet" else network(kind)
    fused: Any = [backbones.fuse(copy.deepcopy(model), torch.int8) for _ in range(2)][0]
    (record,) = [r for r in caplog.records if "stays in float32" in r.message]
    assert "VISION_BACKBONES_NATIVE=0" in record.message
    assert fused.precision.reason and not fused.precision.quantized
    with torch.no_grad():
        assert _error(fused(x), model(x)) < 1e-5
