"""Feed-forwards in one pass against float64, and the fallback to their layers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from compiled_kernels import LINEAR_DTYPES, PLAIN_ACTIVATIONS, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp, PackedExpansion


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


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What goes into a layer of bfloat16 is rounded."""
    return x.to(dtype).double() if dtype == torch.bfloat16 else x


def _hidden(parts: nn.ModuleDict, x: Tensor, activations: tuple[str, str], **has: bool) -> Tensor:
    """What goes into the last layer, in float64."""
    dtype, parts, x = x.dtype, copy.deepcopy(parts).double(), x.double()
    first, last = (PLAIN_ACTIVATIONS[name] for name in activations)
    if has.get("has_first", True):
        x = _rounded(parts["norm"](x), dtype) if has.get("has_norm") else x
        x = first(parts["fc1"](x))
    if has.get("has_conv", True):
        # Contiguous: in float64, torch is several times as fast.
        x = _rounded(x, dtype).permute(0, 3, 1, 2).contiguous()
        x = last(parts["conv"](x).permute(0, 2, 3, 1))
    return x


def _check(
    parts: nn.ModuleDict,
    x: Tensor,
    activations: tuple[str, str],
    bound: float,
    *,
    threads: int = 1,
    plus: float = 1.0,
    **has: bool,
) -> None:
    """Compare two calls, which are equal, with the layers one by one."""
    first = parts["fc1"] if has.get("has_first", True) else None
    conv = parts["conv"] if has.get("has_conv", True) else None
    packed = PackedDepthwiseMlp(first, conv, parts["fc2"], *activations)
    hidden = _rounded(_hidden(parts, x, activations, **has), x.dtype)
    expected = copy.deepcopy(parts["fc2"]).double()(hidden)
    residual = torch.randn(expected.shape).to(x.dtype) if has.get("has_residual") else None
    expected = expected if residual is None else expected + residual
    with using_threads(threads):
        norm = parts["norm"] if has.get("has_norm") else None
        outs = [packed(x, residual, norm) for _ in range(2)]
    assert torch.equal(*outs)
    assert outs[0].dtype == x.dtype and outs[0].is_contiguous()
    assert outs[0].shape == expected.shape
    assert (outs[0] - expected).abs().max() <= bound * (plus + expected.abs().max())


def _check_expansion(parts: nn.ModuleDict, x: Tensor, activations: tuple[str, str]) -> None:
    """The first two layers, with the means of channels."""
    packed = PackedExpansion(parts["fc1"], parts["conv"], *activations)
    (out, means), again = packed(x), packed(x)
    assert all(map(torch.equal, (out, means), again))
    exact = _hidden(parts, x, activations)
    hidden = _hidden(parts, x, activations, has_conv=False)
    atol = 4 * LINEAR_DTYPES[x.dtype] * (1 + hidden.abs().max().item() + exact.abs().max().item())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(means.double(), exact.mean((1, 2)), rtol=0, atol=atol)


@settings(max_examples=60)
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
    # A norm of few channels divides rounding errors by their small deviation.
    bound = 20 if has_norm and dims[0] < 8 else 1
    # In bfloat16 some inputs of a layer are rounded up that here are rounded down.
    bound *= {torch.float32: 5e-6, torch.bfloat16: 2**-7}[dtype]
    x = torch.randn(batch, *size, dims[0]).to(dtype)
    has = {"has_norm": has_norm, "has_conv": has_conv, "has_residual": has_residual}
    _check(_parts(*dims, bias=bias).to(dtype), x, activations, bound, **has)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    side=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    hidden=st.integers(16, 420),
    has_first=st.booleans(),
    has_residual=st.booleans(),
    threads=st.integers(1, 2),
    activations=st.tuples(*[st.sampled_from(["none", "relu", "silu", "hardswish"])] * 2),
)
def test_inverted_bottlenecks_and_expansions(
    dtype, batch, size, side, stride, hidden, has_first, has_residual, threads, activations
) -> None:
    parts = _parts(12 if has_first else hidden, hidden, 20, True, side, stride).to(dtype)
    x = 3 * torch.randn(batch, *size, parts["fc1"].in_features).to(dtype)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    has = {"has_first": has_first, "has_residual": has_residual}
    _check(parts, x, ("relu6", "relu6"), bound, threads=threads, **has)
    if has_first:
        _check_expansion(parts, x / 3, activations)


@settings(max_examples=30)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    # Of strips, with chunks of channels in each, and of blocks of columns.
    large=st.sampled_from([(90, 41, 96), (90, 41, 700), (50, 23, 500), (21, 203, 330)]),
    wide=st.none() | st.tuples(st.sampled_from([1, 2, 3, 19]), st.integers(128, 280)),
    window=st.sampled_from([(3, 1), (5, 1), (7, 1), (5, 2), (7, 2)]),
    has_norm=st.booleans(),
    has_first=st.booleans(),
    has_residual=st.booleans(),
    threads=st.integers(1, 3),
)
def test_strips_and_blocks_of_large_maps(
    dtype, large, wide, window, has_norm, has_first, has_residual, threads
) -> None:
    height, width, hidden = large if wide is None else (*wide, 330)
    parts = _parts(16 if has_first else hidden, hidden, 20, True, *window).to(dtype)
    x = torch.randn(1, height, width, parts["fc1"].in_features).to(dtype)
    activations = ("none", "gelu") if has_first else ("relu6", "relu6")
    has = {"has_norm": has_norm and has_first, "has_first": has_first, "has_residual": has_residual}
    has |= {"plus": 0.0 if has_first else 1.0}
    _check(parts, x, activations, 2 * LINEAR_DTYPES[dtype], threads=threads, **has)


@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
def test_many_tokens(dtype: torch.dtype) -> None:
    x, parts = torch.randn(2, 90, 41, 24).to(dtype), _parts(24, 700, 20).to(dtype)
    _check(parts, x, ("gelu", "none"), 2 * LINEAR_DTYPES[dtype], has_conv=False, plus=0.0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", LINEAR_DTYPES)
@pytest.mark.parametrize("shape", [(4, 7, 9, 12), (1, 61, 40, 12), (1, 5, 300, 12)])
def test_expansions_of_strips_and_blocks(
    shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    """Maps of one strip, of several, and of several blocks of columns."""
    parts = _parts(12, 217, 8, True, 5, 2).to(dtype)
    with using_threads(threads):
        _check_expansion(parts, torch.randn(shape).to(dtype), ("silu", "silu"))


_WITHOUT_A_FIRST_LAYER = """
import torch
from torch import nn
from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp
for hidden in (385, 398, 769):
    conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
    packed = PackedDepthwiseMlp(None, conv, nn.Conv2d(hidden, 8, 1))
    for side in (4, 8, 16):  # larger scratch buffers each time, which free the smaller ones
        packed(torch.randn(1, side, side, hidden))
"""


def test_a_last_step_of_few_channels_writes_nothing_before_its_buffer() -> None:
    """glibc finds damage before a block when it frees it, if the block has pages of its own."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096"}
    command = [sys.executable, "-c", _WITHOUT_A_FIRST_LAYER]
    assert subprocess.run(command, env=env, capture_output=True, timeout=100).returncode == 0


# ---- numbers and layers ------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_nan_reaches_the_windows_that_see_it(side: int, stride: int) -> None:
    parts = _parts(16, 16, 8, True, side, stride)
    for first in (None, parts["fc1"]):
        packed = PackedDepthwiseMlp(first, parts["conv"], parts["fc2"], "relu6", "relu6")
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
        conv(dilation=2),
        conv(groups=4),
        conv(padding_mode="reflect"),
    ):
        assert not PackedDepthwiseMlp.applies(other)
