"""The depthwise kernel against torch's convolution in float64; bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import PLAIN_ACTIVATIONS, random, steepness, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cpu.activations import ACTIVATIONS
from ops.cpu.depthwise.conv import depthwise_branches, depthwise_conv2d, taps_first


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


pair = st.tuples(st.integers(1, 2), st.integers(1, 2))


@settings(max_examples=100)
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 3, 8, 16, 24, 40]),
    multiplier=st.sampled_from([1, 1, 2, 3, 5]),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    kernel=st.tuples(*[st.sampled_from([1, 2, 3, 5, 7, 11, 13])] * 2),
    stride=pair,
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 13), st.integers(0, 13)),
    activation=st.sampled_from(ACTIVATIONS),
    has_bias=st.booleans(),
)
def test_is_the_convolution(
    batch, channels, multiplier, size, kernel, stride, dilation, padding, activation, has_bias
) -> None:
    padding = tuple(
        max(p, -(-(d * (k - 1) + 1 - n) // 2))  # so that the window fits
        for p, d, k, n in zip(padding, dilation, kernel, size, strict=True)
    )
    x = random(batch, channels, *size)
    weight = random(channels * multiplier, 1, *kernel, seed=1)
    bias = random(len(weight), seed=2) if has_bias else None
    expected = F.conv2d(x, weight, bias, stride, padding, dilation, channels)
    geometry = stride, padding, dilation
    out = depthwise_conv2d(x.float(), taps_first(weight), _float(bias), *geometry, activation)
    assert out.is_contiguous(memory_format=torch.channels_last)
    # Relative to the sums without cancellation.
    scale = F.conv2d(x.abs(), weight.abs(), None, stride, padding, dilation, channels).max() + 1
    scale = scale * steepness(activation, scale)
    assert (out - PLAIN_ACTIVATIONS[activation](expected)).abs().max() < 1e-6 * scale


@settings(max_examples=80)
@given(
    channels=st.sampled_from([1, 5, 16, 21, 64, 70]),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    side=st.sampled_from([3, 5, 7]),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    activation=st.sampled_from(ACTIVATIONS),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_padded_squares(channels, size, side, stride, activation, has_bias, dtype) -> None:
    """Read in place, without a look at the channels beside them."""
    wide = torch.full((2, channels + 4, *size), torch.nan, dtype=dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    x = wide[:, 2:-2].copy_(random(2, channels, *size))
    weight = random(channels, 1, side, side, seed=1).to(dtype).double()
    bias = random(channels, seed=2) if has_bias else None
    given_ = taps_first(weight), _float(bias), stride, (side // 2, side // 2)
    out = depthwise_conv2d(x, *given_, activation=activation)
    expected = F.conv2d(x.double(), weight, bias, stride, side // 2, 1, channels)
    largest = expected.abs()
    expected = PLAIN_ACTIVATIONS[activation](expected)
    bound = 1e-6 * (2 * side**2 + 2) if dtype == torch.float32 else 2**-8 * (1 + expected.abs())
    assert ((out - expected).abs() <= bound * steepness(activation, largest)).all()


@settings(max_examples=60)
@given(
    channels=st.sampled_from([1, 16, 21, 70]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(9, 17), st.integers(9, 18)),
    padding=st.tuples(st.integers(8, 13), st.integers(8, 13)),
    activation=st.sampled_from(ACTIVATIONS),
    has_bias=st.booleans(),
)
def test_large_windows_in_bfloat16(channels, size, kernel, padding, activation, has_bias) -> None:
    """Which are computed in pairs of pixels where the CPU multiplies those."""
    wide = torch.full((2, channels + 4, *size), torch.nan, dtype=torch.bfloat16)
    wide = wide.contiguous(memory_format=torch.channels_last)
    x = wide[:, 2:-2].copy_(random(2, channels, *size))
    weight = random(channels, 1, *kernel, seed=1).bfloat16().double()
    bias = random(channels, seed=2) if has_bias else None
    padding = tuple(max(p, k - n) for p, k, n in zip(padding, kernel, size, strict=True))
    given_ = taps_first(weight), _float(bias), (1, 1), padding
    out = depthwise_conv2d(x, *given_, activation=activation)
    expected = F.conv2d(x.double(), weight, bias, 1, padding, 1, channels)
    largest = expected.abs()
    expected = PLAIN_ACTIVATIONS[activation](expected)
    bound = 2**-8 * (1 + expected.abs())
    assert ((out - expected).abs() <= bound * steepness(activation, largest)).all()


@pytest.mark.parametrize("channels", [48, 256])  # pixels of 256 channels share sets of the cache
def test_squares_of_large_maps(channels: int) -> None:
    for side, stride, height, width in ((7, 1, 30, 37), (5, 2, 27, 150), (7, 2, 40, 64)):
        x, weight = random(1, channels, height, width), random(channels, 1, side, side, seed=1)
        expected = F.conv2d(x, weight, None, stride, side // 2, 1, channels)
        strides, padding = (stride, stride), (side // 2, side // 2)
        out = depthwise_conv2d(x.float(), taps_first(weight), None, strides, padding)
        assert _relative(out, expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_pass(dtype) -> None:
    x = torch.zeros(1, 48, 5, 5, dtype=dtype)
    x[0, 3, 2, 2], x[0, 4, 2, 2] = float("nan"), float("inf")
    taps = torch.ones(3, 3, 48)
    for activation in ("relu", "gelu", "silu", "relu6"):
        out = depthwise_conv2d(x, taps, None, (1, 1), (1, 1), activation=activation)
        assert out[0, 3, 1:4, 1:4].isnan().all()
        assert out[0, 3].isnan().sum() == 9
        assert out[0, 5:].eq(0).all()
    assert out[0, 4, 1:4, 1:4].eq(6).all()
    assert depthwise_conv2d(x, taps, None, (1, 1), (1, 1))[0, 4, 1:4, 1:4].isinf().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("passed", [0, 22])
def test_branches(passed: int, batch: int, threads: int) -> None:
    x = random(batch, passed + 18, 33, 40)
    kernels = ((3, 3), (1, 11), (11, 1))
    weights = [random(6, 1, *k, seed=i) for i, k in enumerate(kernels)]
    biases = [random(6, seed=i) for i in range(3)]
    parts = [x[:, :passed]]
    for i, (rows, columns) in enumerate(kernels):
        part = x[:, passed + 6 * i : passed + 6 * i + 6]
        padding = (rows // 2, columns // 2)
        parts.append(F.conv2d(part, weights[i], biases[i], 1, padding, 1, 6))
    taps = [taps_first(w) for w in weights]
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        with using_threads(threads):
            out = depthwise_branches(x.to(dtype), taps, [b.float() for b in biases])
        assert out.dtype == dtype and _relative(out, torch.cat(parts, 1)) < tolerance
