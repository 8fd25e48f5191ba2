"""Feed-forwards as rewriting makes them, against their layers one by one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import LINEAR_DTYPES
from torch import Tensor, nn

from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp, depthwise_mlp
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastLinear, activate, convert
from ops.inference.norm import FastLayerNorm
from ops.rewriting import feed_forward
from ops.rewriting.feed_forward import FeedForward

X = torch.randn(2, 9, 11, 24, generator=torch.Generator().manual_seed(0))


def _made(*, has_conv: bool, has_norm: bool = True) -> FeedForward:
    torch.manual_seed(0)
    fc1, fc2 = (convert(nn.Linear(*n), FastLinear) for n in ((24, 80), (80, 24)))
    conv = nn.Conv2d(80, 80, 3, padding=1, groups=80)
    last = convert(conv, FastDepthwiseConv2d) if has_conv else None
    activate(fc1 if last is None else last, "gelu")
    norm = convert(nn.LayerNorm(24), FastLayerNorm) if has_norm else None
    return FeedForward(fc1, fc2, last, norm).requires_grad_(False)


def _expected(made: FeedForward, x: Tensor) -> Tensor:
    hidden = x if made.norm is None else F.layer_norm(x, (24,), made.norm.weight, made.norm.bias)
    assert made.fc1 is not None
    hidden = F.linear(hidden, made.fc1.weight, made.fc1.bias)
    if made.conv is not None:
        hidden = hidden.permute(0, 3, 1, 2)
        hidden = F.conv2d(hidden, made.conv.weight, made.conv.bias, padding=1, groups=80)
        hidden = hidden.permute(0, 2, 3, 1)
    return x + F.linear(F.gelu(hidden), made.fc2.weight, made.fc2.bias)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("has_conv", [True, False])
def test_fallback_to_layers_one_by_one(
    has_conv: bool, has_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _made(has_conv=has_conv, has_norm=has_norm)
    expected = _expected(made, X)
    calls: list[Tensor] = []
    monkeypatch.setattr(PackedDepthwiseMlp, "pays", lambda self, x: calls.append(x) is None)
    torch.testing.assert_close(made(X, X), expected)
    assert calls
    monkeypatch.setattr(PackedDepthwiseMlp, "pays", lambda self, x: False)
    torch.testing.assert_close(made(X, X), expected)
    exact = copy.deepcopy(made).double()(X.double(), X.double())
    torch.testing.assert_close(exact.float(), expected)
    monkeypatch.setattr(depthwise_mlp, "unavailable", lambda *_: "switched off")
    torch.testing.assert_close(copy.deepcopy(made)(X, X), expected)
    grown = X.clone().requires_grad_()
    made(grown, grown).sum().backward()
    assert grown.grad is not None


def test_bfloat16_in_one_pass() -> None:
    made = _made(has_conv=True)
    expected = made(X)
    half = copy.deepcopy(made).bfloat16()
    out = half(X.bfloat16())
    assert (out - expected).abs().max() <= 2**-7 * (1 + expected.abs().max())
    one_pass = isinstance(half.derived(X.bfloat16()), PackedDepthwiseMlp)
    assert one_pass == (torch.bfloat16 in LINEAR_DTYPES)


@pytest.mark.parametrize("residual", [True, False])
def test_large_maps_in_pieces(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise_mlp, "unavailable", lambda *_: "switched off")
    monkeypatch.setattr(feed_forward, "packed_pair", lambda *_: None)
    monkeypatch.setattr(feed_forward, "_CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(feed_forward, "_CHUNK_ROWS", 7)
    made = _made(has_conv=False)
    expected = _expected(made, X) - (0 if residual else X)
    torch.testing.assert_close(made(X, X if residual else None), expected)
