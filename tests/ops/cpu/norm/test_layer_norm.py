"""The layer norm kernel against float64, bad arguments, and the layer that calls it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import PLAIN_ACTIVATIONS, random, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ops.cpu.norm.layer_norm import layer_norm
from ops.inference.layers import convert
from ops.inference.norm import FastLayerNorm


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.lists(st.integers(1, 19), min_size=1, max_size=3),
    dim=st.sampled_from([1, 2, 15, 16, 20, 40, 64, 65, 96, 300]),
    activation=st.sampled_from(list(PLAIN_ACTIVATIONS)),
    shift=st.sampled_from([0.0, 30.0]),
)
def test_is_the_norm(dtype, size, dim, activation, shift) -> None:
    x = (random(*size, dim) + shift).to(dtype)
    weight, bias = random(dim, seed=1), random(dim, seed=2)
    expected = F.layer_norm(x.double(), (dim,), weight, bias, 1e-3)
    expected = PLAIN_ACTIVATIONS[activation](expected)
    out = layer_norm(x, weight.float(), bias.float(), 1e-3, activation)
    assert out.dtype == dtype and out.is_contiguous()
    # Float32 keeps 24 bits of the shift, and a norm of few channels divides by their deviation.
    tolerance = (2**-8 if dtype == torch.bfloat16 else 1e-6) + shift * 2e-6
    few = 30 if dim < 15 else 1
    assert (out - expected).abs().max() <= few * tolerance * (1 + expected.abs().max())


@pytest.mark.parametrize("size", [(2, 30, 37, 24), (1, 1, 3, 40_003)])
def test_threads_and_strides_change_nothing(size: tuple[int, ...]) -> None:
    x = random(*size).float()[..., 3:]
    dim = x.shape[3]
    weight, bias = random(dim, seed=1).float(), random(dim, seed=2).float()
    outs = []
    for threads in (1, 3, 7):
        with using_threads(threads):
            outs.append(layer_norm(x, weight, bias, 1e-6, "gelu"))
    torch.testing.assert_close(outs[0], F.gelu(F.layer_norm(x, (dim,), weight, bias, 1e-6)))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_nan_stays_within_its_pixel() -> None:
    x = random(4, 20).float()
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    lost = layer_norm(x, torch.ones(20), torch.zeros(20), 1e-6, "gelu").isnan()
    assert lost[1:3].all() and not lost[[0, 3]].any()


def test_rejects_bad_arguments() -> None:
    x, ones = torch.zeros(2, 3), torch.ones(3)
    assert layer_norm(x[:0], ones, ones, 1e-6).shape == (0, 3)
    with pytest.raises(ValueError, match="activation must be one of.*got 'softplus'"):
        layer_norm(x, ones, ones, 1e-6, "softplus")
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(3,\) and \(2,\)"):
        layer_norm(x, ones, ones[:2], 1e-6)
    with pytest.raises(ValueError, match=r"bias must be torch.float32, got torch.bfloat16"):
        layer_norm(x.bfloat16(), ones, ones.bfloat16(), 1e-6)
    with pytest.raises(RuntimeError, match="not torch.float64"):
        layer_norm(x.double(), ones, ones, 1e-6)
    assert "meta" in str(layer_norm.unavailable(torch.device("meta"), torch.float32))


def _random_affine(norm: nn.LayerNorm) -> nn.LayerNorm:
    if norm.elementwise_affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_of_tokens(dtype: torch.dtype, monkeypatch) -> None:
    norm = _random_affine(nn.LayerNorm(20, 0.5))
    norm, x = norm.to(dtype), torch.randn(2, 9, 20).to(dtype)
    fast = convert(copy.deepcopy(norm), FastLayerNorm)
    expected = norm(x)
    for image, out in ((x, expected), (x, expected), (x[:0], expected[:0])):
        torch.testing.assert_close(fast(image), out, rtol=2**-7, atol=1e-5)
    apart = x.transpose(0, 1)
    torch.testing.assert_close(fast(apart), norm(apart), rtol=2**-7, atol=1e-5)
    fast.weight.mul_(2)
    assert not torch.allclose(fast(x), expected)
    grown = x.clone().requires_grad_()
    fast(grown).sum().backward()
    assert grown.grad is not None
