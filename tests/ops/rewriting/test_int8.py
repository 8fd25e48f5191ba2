"""Rewrites of layers in int8: they stay in int8, with the same weights, or are named as floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_graphs import IMAGE, TOKENS, Call, graph_of, names_of
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.gemm.int8 import int8_unavailable, quantize_weight
from ops.inference.packed_linear import Quantization

_REASON = int8_unavailable(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")


def _made(function: Callable[..., Any], int8: str, **layers: nn.Module) -> Call:
    """A module of layers, some of them in int8."""
    torch.manual_seed(0)
    model = Call(function, **layers)
    for name in int8.split():
        model.get_submodule(name).quantization = Quantization()  # type: ignore[assignment]
    return model


def _check(model: Call, x: Tensor, *expected: str, used: str) -> Any:
    """Assert which operators are left, that they are close, and which layers are in int8."""
    graph = graph_of(model, x)
    assert names_of(graph) == list(expected), str(graph)
    with torch.no_grad():
        out, wanted = graph(x)[0], model(x)
    error = ((out - wanted).norm() / wanted.norm()).item()
    assert error < 0.03 and (error > 1e-5 or not used)
    found = {n: q for n, m in model.named_modules() if (q := vars(m).get("quantization"))}
    assert {name for name, quantization in found.items() if quantization.is_used} == {*used.split()}
    return next(o.function for o in graph.operators if o.name == expected[-1])


def test_norms_activations_shortcuts_and_gates() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        gates = x.mean((2, 3), keepdim=True).sigmoid()
        return x + m.norm(m.conv(F.relu(x) * gates))

    conv = nn.Conv2d(16, 16, 1, bias=False)
    model = _made(forward, "conv", conv=conv, norm=nn.BatchNorm2d(16))
    expected = ("FastAdaptiveAvgPool2d", "sigmoid", "relu", "FastLinear")
    layer = _check(model, IMAGE, *expected, used="conv")
    # Folded, with a negative scale, it has the same int8 up to the sign.
    quantized, _ = quantize_weight(layer.weight)
    assert torch.equal(quantized, -quantize_weight(conv.weight.flatten(1))[0])


def test_dense_convolutions() -> None:
    conv = nn.Conv2d(16, 24, 3, 2, 1, bias=False)
    model = _made(lambda m, x: F.relu(m.norm(m.conv(x))), "conv", conv=conv)
    model.norm = nn.BatchNorm2d(24)
    _check(model, IMAGE, "FastConv2d", used="conv")


@pytest.mark.parametrize("int8", ["wide narrow", "wide", "narrow"])
def test_branches_are_in_int8_if_all_are(int8: str) -> None:
    wide, narrow = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
    model = _made(lambda m, x: m.wide(x) + m.narrow(x) + m.norm(x), int8, wide=wide, narrow=narrow)
    model.norm = nn.BatchNorm2d(16)
    _check(model, IMAGE, "FastConv2d", used=int8 if int8 == "wide narrow" else "")


@pytest.mark.parametrize("int8", ["fc1 fc2", "fc1", "fc2"])
def test_feed_forwards(int8: str) -> None:
    fc1, fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
    model = _made(lambda m, x: x + m.fc2(F.gelu(m.fc1(m.norm(x)))), int8, fc1=fc1, fc2=fc2)
    model.norm = nn.LayerNorm(16)
    _check(model, TOKENS, "FeedForward", used=int8)


@pytest.mark.parametrize("fewest", [1, 1000])
def test_feed_forwards_with_a_depthwise_convolution(
    fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few channels, the kernel of the block computes in floats."""
    for name in ("_FEWEST_OF_DEPTHWISE", "_FEWEST_OF_DEPTHWISE_IN_TILES"):
        monkeypatch.setattr(policy, name, fewest)
    fc1, conv = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
    model = _made(lambda m, x: m.fc2(F.relu(m.conv(m.fc1(x)))), "fc1", fc1=fc1, conv=conv)
    model.fc2 = nn.Conv2d(64, 16, 1)
    model.fc2.quantization = Quantization()  # type: ignore[assignment]
    _check(model, IMAGE, "FeedForward", used="fc1 fc2" if fewest == 1 else "")


@pytest.mark.parametrize("in_range", [None, (0.01, 128.0)])
def test_response_norms(in_range: tuple[float, float] | None) -> None:
    """The norm's bias becomes part of the second layer, whose inputs then have other ranges."""
    norm = GlobalResponseNorm(64, channels_last=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias, 3.0)
    fc1, fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
    model = _made(lambda m, x: m.fc2(m.norm(F.gelu(m.fc1(x)))), "fc1", fc1=fc1, norm=norm, fc2=fc2)
    fc2.quantization = Quantization(in_range)  # type: ignore[assignment]
    x = IMAGE.permute(0, 2, 3, 1).contiguous()
    layer = _check(model, x, "ResponseFeedForward", used="fc1 fc2")
    assert layer.fc2.quantization.in_range is None


def test_other_weights_than_the_layers() -> None:
    """Products that a module computes from its weight, or with another tensor, are in floats."""
    fc = nn.Linear(16, 24)
    model = _made(lambda m, x: F.linear(x, m.fc.weight * 2, m.fc.bias), "fc", fc=fc)
    _check(model, TOKENS, "FastLinear", used="")
    direct = _made(lambda m, x: F.linear(x, m.fc.weight), "fc", fc=nn.Linear(16, 24))
    _check(direct, TOKENS, "FastLinear", used="fc")
