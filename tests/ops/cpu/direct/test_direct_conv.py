"""Convolutions that read windows in place, against float64; bad arguments; when they are used."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_kernels import (
    LINEAR_DTYPES,
    PLAIN_ACTIVATIONS,
    compiled_for,
    conv_layer,
    random,
    using_threads,
    without_kernels,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.activations import ACTIVATIONS
from ops.cpu.direct.direct_conv import DirectConv2d
from ops.inference.layers import FastConv2d, activate, convert

DTYPES = {dtype: bound for dtype, bound in LINEAR_DTYPES.items() if policy.multiplies(dtype)}

_pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


def _agrees(x: Tensor, conv: nn.Conv2d, activation: str = "none") -> Tensor:
    out = DirectConv2d(conv)(x, activation)
    expected = PLAIN_ACTIVATIONS[activation](copy.deepcopy(conv).double()(x.double()))
    assert out.shape == expected.shape and out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - expected).abs().max() < 4 * DTYPES[x.dtype] * (1 + expected.abs().max())
    return out


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 19), st.integers(1, 33)),
    groups=st.integers(1, 4),
    channels=st.tuples(st.sampled_from([2, 6, 24]), st.sampled_from([1, 7, 17, 24, 40, 64])),
    kernel_size=_pairs,
    stride=_pairs,
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_is_the_convolution(
    dtype, batch, size, groups, channels, kernel_size, stride, padding, activation, bias,
    channels_last,
) -> None:  # fmt: skip
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel_size, strict=True)))
    geometry = dict(kernel_size=kernel_size, stride=stride, padding=padding, bias=bias)
    of_all = [groups * count for count in channels]
    x = random(batch, of_all[0], *size).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    _agrees(x, conv_layer(*of_all, dtype, groups=groups, **geometry), activation)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_bands_and_threads(dtype: torch.dtype) -> None:
    """A map larger than the cache is read in bands of rows."""
    conv = conv_layer(72, 120, dtype, kernel_size=3, stride=2, padding=1, groups=3)
    x = random(2, 72, 61, 90).to(dtype)
    outs = []
    for threads in (1, 2):
        with using_threads(threads):
            outs.append(_agrees(x, conv, "relu"))
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_other_instruction_sets(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_for(instructions, monkeypatch)
    conv = conv_layer(48, 72, kernel_size=3, stride=(1, 2), padding=1, groups=2)
    _agrees(random(2, 48, 9, 12).float(), conv, "silu")


def test_no_images() -> None:
    conv = conv_layer(48, 72, kernel_size=3, stride=2, groups=3)
    assert DirectConv2d(conv)(torch.zeros(0, 48, 7, 5)).shape == (0, 72, 3, 2)


def test_rejects_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = DirectConv2d(conv_layer(16, 8, kernel_size=3, groups=2))
    for x in (torch.zeros(1, 8, 5, 5), torch.zeros(1, 17, 5, 5), torch.zeros(16, 5, 5)):
        with pytest.raises(ValueError, match="with the channels and dtype of the weight, got"):
            packed(x)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=f"got .* of {dtype}"):
            packed(torch.zeros(1, 16, 5, 5, dtype=dtype))
    with pytest.raises(ValueError, match=r"map of \(2, 5\).*smaller than the window of \(3, 3\)"):
        packed(torch.zeros(1, 16, 2, 5))
    with pytest.raises(ValueError, match="got 'softplus'"):
        packed(torch.zeros(1, 16, 5, 5), "softplus")
    others = (
        conv_layer(16, 8, kernel_size=3, dilation=2),
        conv_layer(16, 8, kernel_size=3, padding="same"),
        conv_layer(16, 8, kernel_size=3, padding=1, padding_mode="reflect"),
        conv_layer(16, 8, kernel_size=3).double(),
        conv_layer(6, 4, torch.bfloat16, kernel_size=3, groups=2),
    )
    for conv in others:
        with pytest.raises(ValueError, match="without dilation, padded with zeros, got"):
            DirectConv2d(conv)
    without_kernels(monkeypatch)
    with pytest.raises(RuntimeError, match="VISION_BACKBONES_NATIVE"):
        packed(torch.zeros(1, 16, 5, 5))


@pytest.mark.parametrize("pays", [True, False])
def test_the_inference_form_asks_the_policy(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "direct_by_kernel", lambda *_: pays)
    plain = conv_layer(48, 72, kernel_size=3, stride=2, padding=1, groups=2)
    layer, x = convert(copy.deepcopy(plain), FastConv2d), torch.randn(2, 48, 9, 10)
    activate(layer, "relu")
    torch.testing.assert_close(layer(x), plain(x).relu(), rtol=1e-5, atol=1e-5)
    assert isinstance(layer.derived(x)[0], DirectConv2d) == pays
