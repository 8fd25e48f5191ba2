"""``fuse()`` on networks of timm, torchvision and transformers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm_models import SMALLEST, Branching, network, vit_of_transformers
from torch import Tensor, nn

import backbones

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


@torch.no_grad()
def _check(model: nn.Module, x: Tensor) -> None:
    """Assert that replays differ from float64 by no more than float32 does, or 1e-5."""
    expected = copy.deepcopy(model).double()(x.double())
    bound = max(1e-5, 4 * _error(model(x), expected))
    fused = backbones.fuse(copy.deepcopy(model))
    for _ in range(3):
        assert _error(fused(x), expected) <= bound
    assert fused.is_replayed  # type: ignore[operator]


@pytest.mark.parametrize("module", QUICK)
def test_outputs_are_equal(module: str) -> None:
    _check(*network(module))


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALLEST)
def test_outputs_are_equal_for_every_module_of_timm(module: str) -> None:
    model, x = network(module)
    _check(model, x)
    half = backbones.fuse(copy.deepcopy(model), torch.bfloat16)
    with torch.no_grad():
        expected, plain = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
        for _ in range(3):
            error = _error(half(x.bfloat16()), expected)
    assert error <= max(0.02, 2 * _error(plain, expected))


@pytest.mark.parametrize("module", ["resnet", "vision_transformer", "convnext"])
@torch.no_grad()
def test_methods_and_lists_of_maps_are_replayed(module: str) -> None:
    model, x = network(module)
    fused: Any = backbones.fuse(copy.deepcopy(model))
    for call in (
        lambda m: m(x),
        lambda m: m.forward_features(x),
        lambda m: m.forward_intermediates(x, indices=[0, 1]),
        lambda m: m.forward_intermediates(x, indices=[1], intermediates_only=True),
    ):
        for _ in range(3):
            assert _error(call(fused), call(model)) <= 1e-5
    assert sum(type(p).__name__ == "Replay" for p in fused._records._programs.values()) == 4
    maps, image = network(module, features_only=True)
    _check(maps, image)
    _check(*network(module, num_classes=0))


@torch.no_grad()
def test_changed_weights_and_hooks_are_respected() -> None:
    model, x = network("resnet")
    fused: Any = backbones.fuse(copy.deepcopy(model))
    for _ in range(3):
        fused(x)
    for m in (model, fused):
        m.layer1[0].conv1.weight.mul_(1.5)
        m.bn1.running_mean.add_(0.1)
    for _ in range(4):
        assert _error(fused(x), model(x)) <= 1e-5
    seen: list[Tensor] = []
    handle = fused.layer2[0].conv1.register_forward_hook(lambda *_: seen.append(x))
    fused(x)
    assert seen
    handle.remove()
    for _ in range(70):
        fused(x)
    assert fused.is_replayed and len(seen) == 1


class _Steps(nn.Module):
    """Layers and what follows them, which only looks like what is rewritten."""

    def __init__(self, steps: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.wide = nn.Linear(16, 16), nn.Linear(16, 32)
        self.conv, self.gate = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.scale = nn.Parameter(torch.randn(16))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def _gated(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x.permute(0, 3, 1, 2))
    return x.permute(0, 3, 1, 2).add(y * m.gate(y.mean((2, 3), True)).sigmoid(), alpha=2)


def _split(m: Any, x: Tensor) -> Tensor:
    first, second = F.gelu(m.wide(x)).chunk(2, -1)
    return F.silu(first) * second


@pytest.mark.parametrize(
    "steps",
    [
        lambda m, x: m.fc(x).add(x, alpha=2),
        lambda m, x: torch.add(x, m.fc(x), alpha=-0.5),
        lambda m, x: m.fc(x).add(m.scale, alpha=3),
        lambda m, x: m.fc(x).add(x, alpha=2).add(x),
        lambda m, x: F.gelu(m.fc(x)) + x * m.scale,
        lambda m, x: F.gelu(m.fc(x)) * m.scale + x,
        _gated,
        _split,
    ],
)
@torch.no_grad()
def test_steps_with_factors_and_two_activations(steps: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    _check(_Steps(steps).eval(), torch.randn(2, 6, 5, 16))


@torch.no_grad()
def test_tied_weights_of_inference_mode_stay_tied() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
        model[2].weight = model[0].weight
    fused: Any = backbones.fuse(model)
    assert fused[0].weight is fused[2].weight and not fused[0].weight.is_inference()
    x, before = torch.randn(3, 8), [fused(torch.ones(3, 8)) for _ in range(3)][-1]
    fused[0].weight.mul_(2)
    assert not torch.equal(fused(torch.ones(3, 8)), before)
    wanted = F.linear(F.gelu(fused[0](x)), fused[0].weight, fused[2].bias)
    torch.testing.assert_close(fused(x), wanted)


def test_networks_that_were_training_are_evaluated() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    fused, x = backbones.fuse(model), torch.randn(4, 8)
    assert not fused.training and torch.equal(fused(x), fused(x))


def test_gradients_of_images() -> None:
    model, x = network("resnet")
    fused = backbones.fuse(copy.deepcopy(model))
    gradients = []
    for m in (model, fused):
        for _ in range(3):
            image = x.clone().requires_grad_()
            m(image).square().sum().backward()
        assert image.grad is not None
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients)


def test_calls_outside_no_grad_are_replayed() -> None:
    model, x = network("resnet")
    fused: Any = backbones.fuse(model)
    for _ in range(2):
        assert not fused(x).requires_grad
    assert fused.is_replayed and not any(p.requires_grad for p in fused.parameters())


@torch.no_grad()
def test_copies_pickles_and_names() -> None:
    model, x = network("resnet")
    fused: Any = backbones.fuse(copy.deepcopy(model))
    for _ in range(3):
        fused(x)
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
    for _ in range(3):
        out = fused(pixel_values=x)
        assert _error(out.last_hidden_state, model(x).last_hidden_state) <= 1e-5
    assert fused.is_replayed


def test_autocast_tracing_and_export_see_the_plainnetwork() -> None:
    model, x = network("resnet")
    fused = backbones.fuse(copy.deepcopy(model))
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert _error(fused(x), model(x)) == 0
        program = torch.export.export(fused, (x,))
        assert _error(program.module()(x), model(x)) <= 1e-6


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@torch.no_grad()
def test_scripts_and_containers() -> None:
    model, x = network("resnet")
    script = torch.jit.trace(model, x)
    assert _error(backbones.fuse(script)(x), model(x)) <= 1e-5
    fused: Any = backbones.fuse(nn.Sequential(nn.Identity(), copy.deepcopy(model)).eval())
    for _ in range(3):
        assert _error(fused(x), model(x)) <= 1e-5
    assert fused.is_replayed and backbones.fuse(nn.ReLU())(x).shape == x.shape
