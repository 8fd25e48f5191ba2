"""Linear and depthwise convolution with the means of channels in one pass, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_kernels import LINEAR_DTYPES, PLAIN_ACTIVATIONS, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu.feed_forward.depthwise_mlp import PackedExpansion


def _layers(dim: int, hidden: int, side: int, stride: int) -> tuple[nn.Linear, nn.Conv2d]:
    torch.manual_seed(0)
    conv = nn.Conv2d(hidden, hidden, side, stride, side // 2, groups=hidden)
    return nn.Linear(dim, hidden).requires_grad_(False), conv.requires_grad_(False)


def _check(
    layers: tuple[nn.Linear, nn.Conv2d], x: Tensor, activations: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    fc, conv = (copy.deepcopy(layer).to(x.dtype) for layer in layers)
    out, means = PackedExpansion(fc, conv, *activations)(x)
    first, last = (PLAIN_ACTIVATIONS[name] for name in activations)
    hidden = first(fc.double()(x.double()))
    if x.dtype == torch.bfloat16:
        hidden = hidden.bfloat16().double()
    # Contiguous: in float64, torch is several times as fast.
    exact = last(conv.double()(hidden.permute(0, 3, 1, 2).contiguous())).permute(0, 2, 3, 1)
    atol = 4 * LINEAR_DTYPES[x.dtype] * (1 + hidden.abs().max().item() + exact.abs().max().item())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(means.double(), exact.mean((1, 2)), rtol=0, atol=atol)
    return out, means


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 23)),
    dims=st.tuples(st.integers(1, 40), st.integers(16, 420)),
    side=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    activations=st.tuples(*[st.sampled_from(["none", "relu", "silu", "hardswish"])] * 2),
)
def test_equals_the_layers_one_by_one(dtype, batch, size, dims, side, stride, activations) -> None:
    x = torch.randn(batch, *size, dims[0]).to(dtype)
    _check(_layers(*dims, side, stride), x, activations)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
@pytest.mark.parametrize("shape", [(8, 7, 9, 12), (2, 61, 40, 12), (1, 12, 300, 12)])
def test_strips_blocks_and_threads(
    shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    """Maps of one strip, of several, and of several blocks of columns."""
    x, layers = torch.randn(shape).to(dtype), _layers(12, 217, 5, 2)
    with using_threads(threads):
        first, second = (_check(layers, x, ("silu", "silu")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
