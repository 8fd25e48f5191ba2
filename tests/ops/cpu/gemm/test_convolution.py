"""Convolutions as matrix products against float64; kernel selection; bad arguments."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import (
    LINEAR_DTYPES,
    PLAIN_ACTIVATIONS,
    conv_layer,
    random,
    using_threads,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu.activations import ACTIVATIONS
from ops.cpu.gemm.convolution import PackedConv2d
from ops.cpu.gemm.int8 import int8_unavailable, quantize_weight, reference
from ops.inference.packed_linear import Quantization

_REASON = int8_unavailable(torch.device("cpu"), torch.float32)

_pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


def _agrees(x: Tensor, conv: nn.Conv2d, activation: str, tolerance: float) -> None:
    out = PackedConv2d(conv)(x, activation)
    expected = PLAIN_ACTIVATIONS[activation](copy.deepcopy(conv).double()(x.double()))
    assert out.shape == expected.shape and out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - expected).abs().max() < 4 * tolerance * (1 + expected.abs().max())


_small = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 19), st.integers(1, 33)),
        "channels": st.tuples(st.sampled_from([1, 3, 16, 20]), st.sampled_from([1, 17, 40])),
        "kernel_size": _pairs,
        "stride": _pairs,
    }
)
# Windows of images, whose rows are copied as they are.
_wide = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(17, 40), st.integers(17, 70)),
        "channels": st.tuples(st.integers(1, 4), st.sampled_from([1, 17, 40])),
        "kernel_size": st.tuples(st.integers(1, 17), st.integers(8, 17)),
        "stride": st.tuples(st.integers(1, 20), st.integers(1, 20)),
    }
)


@settings(max_examples=140, deadline=None)
@given(
    windows=_small | _wide,
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    batch=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_is_the_convolution(
    windows, dtype, batch, padding, activation, bias, channels_last
) -> None:
    size, channels = windows["size"], windows["channels"]
    sides = zip(size, padding, windows["kernel_size"], strict=True)
    assume(all(n + 2 * p >= k for n, p, k in sides))
    geometry = {name: windows[name] for name in ("kernel_size", "stride")}
    x = random(batch, channels[0], *size).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    conv = conv_layer(*channels, dtype, **geometry, padding=padding, bias=bias)
    _agrees(x, conv, activation, LINEAR_DTYPES[dtype])


@pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")
@pytest.mark.parametrize("in_range", [None, (0.02, 120.0)], ids=["own", "given"])
@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES), ids=str)
@pytest.mark.parametrize(
    ("channels", "geometry"),
    [
        ((20, 40), {"kernel_size": 3, "stride": 1, "padding": 1}),
        ((64, 17), {"kernel_size": (1, 5), "stride": (2, 3), "padding": (0, 2)}),
        ((3, 40), {"kernel_size": 9, "stride": 8, "padding": 5, "bias": False}),
        ((16, 100), {"kernel_size": 1, "stride": 2}),
    ],
)
def test_in_int8_windows_are_rows(channels, geometry, dtype, in_range) -> None:
    conv = conv_layer(*channels, **geometry)
    x = random(2, channels[0], 21, 30).to(dtype)
    x[1, 0, 3, 4] = 50  # other rows have other ranges
    given_ = None if in_range is None else torch.tensor(in_range)
    bias = torch.zeros(channels[1]) if conv.bias is None else conv.bias
    windows = F.unfold(x.float(), conv.kernel_size, 1, conv.padding, conv.stride).transpose(1, 2)
    weight, scale = quantize_weight(conv.weight.flatten(1))
    expected = reference(windows, weight, scale, bias, given_).relu()
    quantization = Quantization(in_range)
    packed = PackedConv2d(conv, quantization.pack)
    assert quantization.is_used
    for threads in (1, 2):
        with using_threads(threads):
            out = packed(x, "relu").flatten(2).transpose(1, 2)
        assert out.dtype == dtype and out.shape == expected.shape
        assert (out - expected).abs().max() < LINEAR_DTYPES[dtype] * 4 * (1 + expected.max())


def test_many_strips_and_threads() -> None:
    conv = conv_layer(64, 40, kernel_size=3, stride=2, padding=1)
    patches = conv_layer(3, 40, kernel_size=9, stride=8, padding=1)
    for layer, x in ((conv, random(3, 64, 61, 90)), (patches, random(2, 3, 250, 251))):
        x, outs = x.float(), []
        for threads in (1, 2):
            with using_threads(threads):
                outs.append(PackedConv2d(layer)(x))
        torch.testing.assert_close(outs[0], layer(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(*outs)
    assert PackedConv2d(conv)(random(0, 64, 61, 90).float()).shape == (0, 40, 31, 45)
