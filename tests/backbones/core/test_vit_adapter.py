"""ViT-Adapter around each family of single-resolution networks."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_tokens import PlainTokens
from torch import Tensor
from torch.nn import functional as F
from zoo import images, randomise, small

import backbones
from backbones import ViTAdapter
from backbones.cli.parity import summary_error

REFERENCE = Path(__file__).parents[2] / "reference"
NETWORKS: dict[str, Any] = {
    "nat_isotropic": lambda: small("nat_isotropic"),
    "plain_tokens": PlainTokens,
    "vig": lambda: backbones.create_model("vig_t", dim=64, num_heads=1, depths=(1, 1, 1, 1)),
    "vrwkv": lambda: small("vrwkv"),
    "vrwkv6": lambda: backbones.create_model("vrwkv6_t", dim=64, depths=(1, 1, 1, 1)),
}


def _adapter(network: str = "plain_tokens", **kwargs: Any) -> ViTAdapter:
    torch.manual_seed(0)
    return ViTAdapter(NETWORKS[network](), **{"num_heads": 2, "stem_dim": 8, **kwargs})


def _last_tokens(adapter: ViTAdapter, x: Tensor) -> Tensor:
    """What the network's last stage makes inside the adapter."""
    seen: list[Tensor] = []
    handle = adapter.network.stages[-1].register_forward_hook(lambda *a: seen.append(a[2]))
    adapter(x)
    handle.remove()
    return seen[0]


# -- what it computes ------------------------------------------------------------------------------
@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_maps_of_any_size(network: str) -> None:
    adapter = _adapter(network).eval()
    dim = adapter.network.num_features
    assert adapter.feature_info.channels() == [dim] * 4
    assert adapter.feature_info.reduction() == [4, 8, 16, 32]
    for height, width in ((32, 32), (33, 64), (50, 95)):
        maps = adapter(images(2, 3, height, width))
        expected = [(2, dim, -(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]
        assert [tuple(m.shape) for m in maps] == expected
        assert all(m.is_contiguous() and m.isfinite().all() for m in maps)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_at_first_the_network_computes_the_same_as_without(network: str) -> None:
    plain = randomise(NETWORKS[network]()).eval()
    adapter = ViTAdapter(copy.deepcopy(plain), num_heads=2, stem_dim=8).eval()
    for size in ((64, 96), (37, 50)):
        x = images(1, 3, *size)
        padded = F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))
        expected = plain.stages(plain.stem(padded))
        torch.testing.assert_close(_last_tokens(adapter, x), expected)
    for around in adapter.adapter.interactions:
        around.injector.gamma.fill_(0.5)
    assert not torch.allclose(_last_tokens(adapter, x), expected, atol=1e-2)


_PUBLISHED: tuple[tuple[str, Any], ...] = (
    (r"^adapter\.prior\.stem\.", "spm.stem."),
    (r"^adapter\.prior\.convs\.(\d)", lambda m: f"spm.conv{int(m[1]) + 2}"),
    (r"^adapter\.prior\.projections\.(\d)", lambda m: f"spm.fc{int(m[1]) + 1}"),
    (r"^adapter\.norms\.(\d)", lambda m: f"norm{int(m[1]) + 1}"),
    (r"\.dwconv\.", ".dwconv.dwconv."),
    (r"^adapter\.", ""),
)


def _published_names(adapter: ViTAdapter, network: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as in Vision-RWKV's detectors, of random values."""
    generator = torch.Generator().manual_seed(2)
    tensors = dict(network)
    for name, tensor in adapter.adapter.state_dict(prefix="adapter.").items():
        for pattern, published in _PUBLISHED:
            name = re.sub(pattern, published, name)
        value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2
        value = 1 + value.abs() if name.endswith("running_var") else value
        tensors[name] = value if tensor.is_floating_point() else tensor
    return tensors


@pytest.mark.parametrize("add_tokens", ["last", "each"])
@torch.no_grad()
def test_is_the_published_one_and_loads_its_detectors(add_tokens: str) -> None:
    """By figures of an implementation in float64 that shares no code, from such a state dict."""
    network = randomise(small("vrwkv")).double()
    adapter = ViTAdapter(
        copy.deepcopy(network), num_heads=2, stem_dim=8, value_ratio=0.5, add_tokens=add_tokens
    )
    adapter.double().eval()
    inner = {k: v for k, v in network.state_dict().items() if not k.startswith(("norm.", "head."))}
    weights = _published_names(adapter, inner)
    detector = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    detector["neck.weight"] = torch.zeros(1)
    report = backbones.load_checkpoint(adapter, {"state_dict": detector})
    assert report.ignored == ["neck.weight"] and not report.reinitialised
    x = images(2, 3, 64, 96).double()
    known = json.loads((REFERENCE / "vit_adapter.json").read_text())[add_tokens]
    for ours, figures in zip(adapter(x), known, strict=True):
        assert summary_error(ours, figures) < 1e-9


@pytest.mark.parametrize(
    ("size", "num_heads", "value_ratio", "millions"),
    [
        ("t", 6, 1, 8.4),
        pytest.param("s", 6, 1, 29.3, marks=pytest.mark.slow),
        ("b", 12, 0.5, 106.6),
        pytest.param("l", 16, 0.5, 351.9, marks=pytest.mark.slow),
    ],
)
def test_has_as_many_parameters_as_published(
    size: str, num_heads: int, value_ratio: float, millions: float
) -> None:
    """Of Vision-RWKV's backbones for dense tasks, by its README."""
    with torch.device("meta"):
        network = backbones.create_model(f"vrwkv_{size}")
        adapter = ViTAdapter(network, num_heads=num_heads, value_ratio=value_ratio)
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1) == millions


# -- training --------------------------------------------------------------------------------------
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("add_tokens", ["last", "none"])
def test_every_parameter_gets_a_gradient(network: str, add_tokens: str) -> None:
    adapter = _adapter(network, add_tokens=add_tokens, drop_path_rate=0.1).train()
    x = images(2, 3, 64, 64).requires_grad_()
    sum(m.square().mean() for m in adapter(x)).backward()
    assert [n for n, p in adapter.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    assert x.grad.any()
    assert all(block.grad.any() for block in adapter.network.stem.parameters())


def test_gradients_do_not_depend_on_checkpointing_or_the_batch() -> None:
    adapter = _adapter("vrwkv").double().eval()
    with torch.no_grad():
        for around in adapter.adapter.interactions:
            around.injector.gamma.fill_(0.5)
    x = images(2, 3, 64, 32).double()

    def gradients(x: Tensor) -> list[Tensor]:
        loss = sum(m.flatten(2).mT.contiguous().pow(3).sum() for m in adapter(x))
        return list(torch.autograd.grad(loss, list(adapter.parameters())))

    together = gradients(x)
    alone = [gradients(x[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, [a + b for a, b in zip(*alone, strict=True)])
    adapter.set_grad_checkpointing()
    assert adapter.network.stages[0].grad_checkpointing
    torch.testing.assert_close(gradients(x), together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_dtypes(dtype: torch.dtype) -> None:
    adapter = _adapter().eval()
    x = images(1, 3, 64, 64)
    expected = adapter(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = adapter(x)
    found = adapter.to(dtype)(x.to(dtype))
    assert all(m.dtype == dtype for m in found)
    for half, other, full in zip(mixed, found, expected, strict=True):
        torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)
        torch.testing.assert_close(other.float(), full, rtol=0.1, atol=0.1)


# -- weights and inference -------------------------------------------------------------------------
def test_classification_checkpoints_load_into_the_network() -> None:
    classifier = randomise(small("vrwkv"))
    adapter = _adapter("vrwkv")
    before = copy.deepcopy(adapter.adapter.state_dict())
    report = backbones.load_checkpoint(adapter, {"state_dict": classifier.state_dict()})
    assert sorted({name.split(".")[0] for name in report.reinitialised}) == ["adapter"]
    assert not report.missing and not report.unexpected
    own = classifier.state_dict()
    for name, tensor in adapter.network.state_dict().items():
        assert torch.equal(tensor, own[name])
    for name, tensor in adapter.adapter.state_dict().items():
        assert torch.equal(tensor, before[name])
    grey = ViTAdapter(small("vrwkv", in_chans=1), num_heads=2, stem_dim=8)
    report = backbones.load_checkpoint(grey, classifier.state_dict())
    assert report.resized == ["network.stem.conv.weight"]
    own = adapter.state_dict()
    report = backbones.load_checkpoint(_adapter("vrwkv"), own)
    assert not report.reinitialised and not report.ignored
    with pytest.raises(backbones.CheckpointError, match="another variant"):
        backbones.load_checkpoint(adapter, _adapter("vrwkv", stem_dim=16).state_dict())
    del own["adapter.level_embed"]
    with pytest.raises(backbones.CheckpointError, match="1 tensors missing"):
        backbones.load_checkpoint(adapter, own)


@torch.no_grad()
def test_the_network_can_be_fused_inside() -> None:
    adapter = _adapter("vrwkv").eval()
    randomise(adapter.network)
    x = images(1, 3, 64, 64)
    expected = adapter(x)
    backbones.fuse(adapter)
    for _ in range(3):  # the second call is captured
        torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-4)


# -- errors ----------------------------------------------------------------------------------------
def _with_another_stride() -> PlainTokens:
    network = PlainTokens()
    network.feature_info[0]["reduction"] = 8
    return network


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ViTAdapter(small("van")), "single-resolution backbone .* got VAN"),
        (lambda: ViTAdapter(small("vrwkv", features_only=True)), "not wrapped by features_only"),
        (lambda: ViTAdapter(PlainTokens(pyramid=True)), "pyramid=False"),
        (lambda: ViTAdapter(small("vrwkv").eval().fuse()), r"before fuse\(\)"),
        (lambda: ViTAdapter(_with_another_stride()), "stride 16, got 8"),
        (
            lambda: ViTAdapter(PlainTokens(depths=(1, 1)), num_heads=2, add_tokens="each"),
            "four stages, got 2",
        ),
        (lambda: _adapter(num_heads=0), "num_heads must be in 1"),
        (lambda: _adapter(num_heads=6), "got 6 heads for 16 channels"),
        (lambda: _adapter(points=0), "points must be in 1"),
        (lambda: _adapter(value_ratio=0), "value_ratio must be above 0"),
        (lambda: _adapter(add_tokens="first"), "one of 'last', 'each', 'none'"),
        (lambda: _adapter(drop_path_rate=2), "drop_path_rate must be in 0"),
        (lambda: _adapter()([1]), "x must be a tensor"),
        (lambda: _adapter()(torch.zeros(3, 64, 64)), r"images must be \(B, 3, H, W\)"),
        (lambda: _adapter()(torch.zeros(1, 4, 64, 64)), r"got \(1, 4, 64, 64\)"),
    ],
)
def test_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        call()


def test_extractors_have_the_stochastic_depth_that_is_asked_for() -> None:
    layers = _adapter(drop_path_rate=0.25).adapter.modules()
    rates = {m.drop_prob for m in layers if type(m).__name__ == "DropPath"}
    assert rates == {0.25}
