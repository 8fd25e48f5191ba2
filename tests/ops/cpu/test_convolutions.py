"""Convolutions by each of our kernels, against float64; in int8; when inference forms use them."""

from __future__ import annotations

import copy
from typing import Any

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

from ops.cpu import policy
from ops.cpu.activations import ACTIVATIONS
from ops.cpu.direct.direct_conv import DirectConv2d
from ops.cpu.gemm.convolution import PackedConv2d
from ops.cpu.gemm.int8 import int8_unavailable, quantize_weight, reference
from ops.cpu.winograd.winograd import WinogradConv2d
from ops.inference.layers import FastConv2d, convert
from ops.inference.packed_linear import Quantization

_REASON = int8_unavailable(torch.device("cpu"), torch.float32)
# By the libraries' names.
KERNELS: dict[str, Any] = {
    "gemm": PackedConv2d,
    "direct": DirectConv2d,
    "winograd": WinogradConv2d,
}
DTYPES = {
    "gemm": list(LINEAR_DTYPES),
    "direct": [dtype for dtype in LINEAR_DTYPES if policy.multiplies(dtype)],
    "winograd": [torch.float32],
}


def assert_is(library: str, conv: nn.Conv2d, x: Tensor, activation: str = "none") -> Tensor:
    """Compare a kernel's convolution with torch's in float64; return it."""
    out = KERNELS[library](conv)(x, activation)
    exact = copy.deepcopy(conv).double()(x.double())
    expected = PLAIN_ACTIVATIONS[activation](exact)
    assert out.shape == expected.shape and out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    bound = 4 * LINEAR_DTYPES[x.dtype] * (1 + expected.abs().max())
    if library == "winograd":
        bound = 2e-6 * (1 + exact.abs().max())
    assert (out - expected).abs().max() <= bound
    return out


def _pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(*[st.integers(least, most)] * 2)


def _cases(library: str, **of: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Channels are those of a group."""
    return st.fixed_dictionaries(
        {
            **{"padding": _pairs(0, 5), "activation": st.sampled_from(ACTIVATIONS)},
            **{"kernel_size": _pairs(1, 4), "stride": _pairs(1, 4), "groups": st.just(1)},
            **{"size": st.tuples(st.integers(1, 19), st.integers(1, 33))},
            **{"dtype": st.sampled_from(DTYPES[library]), "batch": st.integers(1, 3)},
            **{"bias": st.booleans(), "channels_last": st.booleans(), **of},
        }
    )


CASES = {
    "gemm": _cases(
        "gemm", channels=st.tuples(st.sampled_from([1, 3, 16, 20]), st.sampled_from([1, 17, 40]))
    )
    # Windows of images, whose rows are copied as they are.
    | _cases(
        "gemm",
        size=st.tuples(st.integers(17, 40), st.integers(17, 70)),
        channels=st.tuples(st.integers(1, 4), st.sampled_from([1, 17, 40])),
        kernel_size=st.tuples(st.integers(1, 17), st.integers(8, 17)),
        stride=_pairs(1, 20),
    ),
    "direct": _cases(
        "direct",
        groups=st.integers(1, 4),
        channels=st.tuples(st.sampled_from([2, 6, 24]), st.sampled_from([1, 7, 17, 24, 40, 64])),
    ),
    "winograd": _cases(
        "winograd",
        size=st.tuples(st.integers(1, 19), st.integers(1, 21)),
        groups=st.integers(1, 7),
        channels=_pairs(1, 50),
        padding=_pairs(0, 2),
        kernel_size=st.just((3, 3)),
        stride=st.just((1, 1)),
        activation=st.sampled_from(["none", "relu", "relu6", "silu", "gelu"]),
    ),
}


@pytest.mark.parametrize("library", KERNELS)
@settings(max_examples=100)
@given(data=st.data())
def test_is_the_convolution(library: str, data: st.DataObject) -> None:
    case = data.draw(CASES[library])
    size, batch, dtype, activation = (case.pop(n) for n in ("size", "batch", "dtype", "activation"))
    sides = zip(size, case["padding"], case["kernel_size"], strict=True)
    assume(all(n + 2 * p >= k for n, p, k in sides))
    channels = [case["groups"] * count for count in case.pop("channels")]
    x = random(batch, channels[0], *size).to(dtype)
    x = x.to(memory_format=torch.channels_last) if case.pop("channels_last") else x
    assert_is(library, conv_layer(*channels, dtype, **case), x, activation)


_LARGE: dict[str, list[Any]] = {
    "gemm": [
        (64, 40, {"kernel_size": 3, "stride": 2, "padding": 1}, (3, 61, 90)),
        (3, 40, {"kernel_size": 9, "stride": 8, "padding": 1}, (2, 250, 251)),
    ],
    "direct": [
        (72, 120, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 3}, (2, 61, 90)),
    ],
    "winograd": [
        (channels, 48, {"kernel_size": 3, "padding": 1, "groups": groups}, size)
        for channels, size in [(64, (8, 28, 27)), (96, (1, 57, 40)), (320, (2, 7, 7))]
        for groups in (1, 8)
    ],
}


@pytest.mark.parametrize("library", KERNELS)
def test_pieces_of_large_maps_and_threads(library: str) -> None:
    for channels, out_channels, geometry, (batch, *size) in _LARGE[library]:
        for dtype in DTYPES[library]:
            conv = conv_layer(channels, out_channels, dtype, **geometry)
            x, outs = random(batch, channels, *size).to(dtype), []
            for threads in (1, 1, 2):
                with using_threads(threads):
                    outs.append(assert_is(library, conv, x, "relu"))
            bound = 0.0 if library == "gemm" else 1e-6
            assert torch.equal(*outs[:2])
            torch.testing.assert_close(*outs[1:], rtol=bound, atol=bound)


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
    given_ = None if in_range is None else torch.tensor(in_range)
    bias = torch.zeros(channels[1]) if conv.bias is None else conv.bias
    weight, scale = quantize_weight(conv.weight.flatten(1))
    quantization = Quantization(in_range)
    packed = PackedConv2d(conv, quantization.pack)
    assert quantization.is_used
    for value, threads in ((50, 1), (50, 2), (torch.inf, 1), (torch.inf, 2)):
        x[1, 0, 3, 4] = value  # other rows have other ranges, or are finite
        rows = F.unfold(x.float(), conv.kernel_size, 1, conv.padding, conv.stride).transpose(1, 2)
        expected = reference(rows, weight, scale, bias, given_).relu()
        with using_threads(threads):
            out = packed(x, "relu").flatten(2).transpose(1, 2)
        assert out.dtype == dtype and out.shape == expected.shape
        bound = LINEAR_DTYPES[dtype] * 4 * (1 + expected.nan_to_num().max())
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound, equal_nan=True)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize(
    ("library", "geometry"),
    [("winograd", {"padding": 1}), ("direct", {"stride": 2, "padding": 1, "groups": 2})],
)
def test_the_inference_form_asks_the_policy(
    library: str, geometry: dict[str, Any], pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, f"{library}_by_kernel", lambda *_: pays)
    plain = conv_layer(48, 72, kernel_size=3, **geometry)
    layer, x = convert(copy.deepcopy(plain), FastConv2d), torch.randn(2, 48, 9, 10)
    layer.activation = "relu"
    torch.testing.assert_close(layer(x), plain(x).relu(), rtol=1e-5, atol=1e-5)
    assert isinstance(layer.derived(x)[0], KERNELS[library]) == pays
