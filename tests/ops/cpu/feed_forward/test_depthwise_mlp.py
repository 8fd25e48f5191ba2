"""Feed-forwards in one pass against float64, and the fallback to their layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_kernels import LINEAR_DTYPES, PLAIN_ACTIVATIONS, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp


def _parts(
    dim: int, hidden: int, out_dim: int, bias: bool = True, side: int = 3, stride: int = 1
) -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(dim),
            "fc1": nn.Linear(dim, hidden, bias=bias),
            "conv": nn.Conv2d(hidden, hidden, side, stride, side // 2, groups=hidden, bias=bias),
            "fc2": nn.Linear(hidden, out_dim, bias=bias),
        }
    )
    nn.init.normal_(parts["norm"].weight)
    nn.init.normal_(parts["norm"].bias)
    return parts.requires_grad_(False)


def _exact(
    parts: nn.ModuleDict,
    x: Tensor,
    activations: tuple[str, str],
    has_norm: bool,
    has_conv: bool,
    has_first: bool = True,
) -> Tensor:
    """In float64; what goes into a layer of bfloat16 is rounded."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double() if dtype == torch.bfloat16 else x

    dtype, parts, x = x.dtype, copy.deepcopy(parts).double(), x.double()
    if has_first:
        x = parts["fc1"](rounded(parts["norm"](x)) if has_norm else x)
        x = rounded(PLAIN_ACTIVATIONS[activations[0]](x))
    if has_conv:
        # Contiguous: in float64, torch is several times as fast.
        x = parts["conv"](x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        x = rounded(PLAIN_ACTIVATIONS[activations[1]](x))
    return parts["fc2"](x)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 23)),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40)),
    activations=st.tuples(*[st.sampled_from(list(PLAIN_ACTIVATIONS))] * 2),
    has_norm=st.booleans(),
    has_conv=st.booleans(),
    has_residual=st.booleans(),
    bias=st.booleans(),
)
def test_equals_the_layers_one_by_one(
    dtype, batch, size, dims, activations, has_norm, has_conv, has_residual, bias
) -> None:
    parts = _parts(*dims, bias=bias).to(dtype)
    packed = PackedDepthwiseMlp(
        parts["fc1"], parts["conv"] if has_conv else None, parts["fc2"], *activations
    )
    x = torch.randn(batch, *size, dims[0]).to(dtype)
    residual = torch.randn(batch, *size, dims[2]).to(dtype)
    expected = _exact(parts, x, activations, has_norm, has_conv)
    expected = expected + residual if has_residual else expected
    out = packed(x, residual if has_residual else None, parts["norm"] if has_norm else None)
    # A norm of few channels divides rounding errors by their small deviation.
    bound = 20 if has_norm and dims[0] < 8 else 1
    # In bfloat16 some inputs of a layer are rounded up that here are rounded down.
    bound *= {torch.float32: 5e-6, torch.bfloat16: 2**-7}[dtype]
    assert out.dtype == dtype and out.is_contiguous()
    assert (out - expected).abs().max() <= bound * (1 + expected.abs().max())


@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("hidden", [96, 700])
def test_strips_and_threads(hidden: int, threads: int, dtype: torch.dtype) -> None:
    """A map of several strips, with chunks of channels in each."""
    parts = _parts(24, hidden, 20).to(dtype)
    bound = 2 * LINEAR_DTYPES[dtype]
    packed = PackedDepthwiseMlp(parts["fc1"], parts["conv"], parts["fc2"], "none", "gelu")
    x = torch.randn(2, 90, 41, 24).to(dtype)
    expected = _exact(parts, x, ("none", "gelu"), True, True)
    with using_threads(threads):
        out = packed(x, None, parts["norm"])
        assert torch.equal(packed(x, None, parts["norm"]), out)
    assert (out - expected).abs().max() <= bound * expected.abs().max()
    tokens = PackedDepthwiseMlp(parts["fc1"], None, parts["fc2"], "gelu")(x)
    expected = _exact(parts, x, ("gelu", "none"), False, False)
    assert (tokens - expected).abs().max() <= bound * expected.abs().max()


@settings(max_examples=15, deadline=None)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    height=st.sampled_from([1, 2, 3, 19]),
    width=st.integers(128, 280),
    has_norm=st.booleans(),
    has_residual=st.booleans(),
    threads=st.integers(1, 3),
)
def test_blocks_of_wide_maps(dtype, height, width, has_norm, has_residual, threads) -> None:
    parts = _parts(16, 330, 20).to(dtype)
    packed = PackedDepthwiseMlp(parts["fc1"], parts["conv"], parts["fc2"], "none", "gelu")
    x = torch.randn(2, height, width, 16).to(dtype)
    residual = torch.randn(2, height, width, 20).to(dtype) if has_residual else None
    expected = _exact(parts, x, ("none", "gelu"), has_norm, True)
    expected = expected if residual is None else expected + residual
    with using_threads(threads):
        out = packed(x, residual, parts["norm"] if has_norm else None)
    assert (out - expected).abs().max() <= 2 * LINEAR_DTYPES[dtype] * expected.abs().max()


def _bottleneck(parts: nn.ModuleDict, has_first: bool = True) -> PackedDepthwiseMlp:
    return PackedDepthwiseMlp(
        parts["fc1"] if has_first else None, parts["conv"], parts["fc2"], "relu6", "relu6"
    )


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    side=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    hidden=st.integers(16, 300),
    has_first=st.booleans(),
    has_residual=st.booleans(),
    threads=st.integers(1, 2),
)
def test_inverted_bottlenecks(
    dtype, batch, size, side, stride, hidden, has_first, has_residual, threads
) -> None:
    parts = _parts(12 if has_first else hidden, hidden, 20, True, side, stride).to(dtype)
    x = 3 * torch.randn(batch, *size, parts["fc1"].in_features).to(dtype)
    expected = _exact(parts, x, ("relu6", "relu6"), False, True, has_first)
    residual = torch.randn(expected.shape).to(dtype) if has_residual else None
    expected = expected if residual is None else expected + residual
    with using_threads(threads):
        out = _bottleneck(parts, has_first)(x, residual)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    assert out.dtype == dtype and out.shape == expected.shape
    assert (out - expected).abs().max() <= bound * (1 + expected.abs().max())


@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [5, 7])
def test_strips_of_inverted_bottlenecks(side: int, stride: int, dtype: torch.dtype) -> None:
    """Maps of many strips, with chunks of channels, and of blocks of columns."""
    for hidden, height, width in ((500, 50, 23), (330, 21, 203)):
        for has_first in (False, True):
            parts = _parts(16 if has_first else hidden, hidden, 20, True, side, stride).to(dtype)
            packed = _bottleneck(parts, has_first)
            x = torch.randn(1, height, width, parts["fc1"].in_features).to(dtype)
            expected = _exact(parts, x, ("relu6", "relu6"), False, True, has_first)
            for threads in (1, 3):
                with using_threads(threads):
                    out = packed(x)
                error = (out - expected).abs().max()
                assert error <= 2 * LINEAR_DTYPES[dtype] * (1 + expected.abs().max())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_nan_reaches_the_windows_that_see_it(side: int, stride: int) -> None:
    parts = _parts(16, 16, 8, True, side, stride)
    for has_first in (False, True):
        packed = _bottleneck(parts, has_first)
        for row, column in ((0, 0), (5, 12), (8, 3)):
            x = torch.zeros(1, 9, 13, 16)
            x[0, row, column, 2] = float("nan")
            lost = packed(x).isnan().any(-1)[0]
            rows, columns = (torch.arange(0, n, stride) for n in (9, 13))
            near = (rows - row).abs()[:, None] <= side // 2, (columns - column).abs() <= side // 2
            assert torch.equal(lost, near[0] & near[1])


def test_convolutions_that_the_kernel_takes() -> None:
    def conv(side: Any = 5, stride: Any = 1, padding: Any = 2, **others: Any) -> nn.Conv2d:
        return nn.Conv2d(8, 8, side, stride, padding, **{"groups": 8, **others})

    assert PackedDepthwiseMlp.applies(conv()) and PackedDepthwiseMlp.applies(conv(7, 2, 3))
    assert not PackedDepthwiseMlp.applies(conv(), is_first=True)  # too few channels
    for other in (
        conv(9, padding=4),
        conv((3, 5), padding=(1, 2)),
        conv(stride=3),
        conv(stride=(1, 2)),
        conv(padding=1),
        conv(padding="same"),
        conv(padding=4, dilation=2),
        conv(groups=4),
        conv(padding_mode="reflect"),
    ):
        assert not PackedDepthwiseMlp.applies(other)
