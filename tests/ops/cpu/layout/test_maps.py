"""Kernels that move maps: NHWC to NCHW and back, and means of windows, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import random, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cpu.layout.nchw import nchw_from_nhwc, nhwc_from_nchw
from ops.cpu.pooling.window_means import window_means
from ops.cpu.pooling.window_pool import window_pool
from ops.rewriting.lift import FastAdaptiveAvgPool2d

OF_MAPS = {
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "batch": st.integers(1, 3),
    "size": st.tuples(st.integers(1, 17), st.integers(1, 17)),
    "channels": st.sampled_from([1, 7, 16, 28, 40, 64, 130]),
}


def _assert_near(out: Tensor, expected: Tensor) -> None:
    tolerance = 1e-6 if out.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=80)
@given(**OF_MAPS, channels_last=st.booleans(), threads=st.sampled_from([1, 2]))
def test_split_and_joined(dtype, batch, size, channels, channels_last, threads) -> None:
    x, other = random(2, batch, channels, *size).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, other = (t.contiguous(memory_format=layout) for t in (x, other))
    affine = random(2, channels).float()
    with using_threads(threads):
        planes, joined = nchw_from_nhwc(x, affine), nhwc_from_nchw(other, x)
    scale, shift = affine.double()[:, :, None, None]
    _assert_near(planes, x.double() * scale + shift)
    assert planes.dtype == dtype and planes.is_contiguous()
    assert torch.equal(joined, other + x)
    assert joined.is_contiguous(memory_format=torch.channels_last)


# ---- means of windows ----------------------------------------------------------------------------
def _plain(x: Tensor, window_size: tuple[int, ...]) -> Tensor:
    """In float64, of (B, H, W, C)."""
    x, options = x.double().permute(0, 3, 1, 2), {"ceil_mode": True, "count_include_pad": False}
    return F.avg_pool2d(x, window_size, **options).permute(0, 2, 3, 1)


@settings(max_examples=80)
@given(
    **OF_MAPS,
    window_size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    layout=st.sampled_from(["whole", "part of the channels", "channels first"]),
)
def test_is_the_mean(dtype, batch, size, channels, window_size, layout) -> None:
    x = random(batch, *size, channels + 3).to(dtype)[..., 2 : 2 + channels]
    if layout == "whole":
        x = x.contiguous()
    elif layout == "channels first":
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    out = window_means(x, window_size)
    # No window is larger than a map to torch.
    expected = _plain(x, tuple(map(min, window_size, size)))
    assert out.dtype == dtype and out.is_contiguous()
    _assert_near(out, expected)


@settings(max_examples=80)
@given(
    **OF_MAPS,
    window_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 4),
    pads=st.booleans(),
    means=st.sampled_from([None, False, True]),
    ceil_mode=st.booleans(),
)
def test_is_the_pooling(dtype, batch, size, channels, window_size, stride, pads, means, ceil_mode):
    x = random(batch, *(n + 4 for n in size), channels).to(dtype)
    x[:, 1, 2, 0] = torch.nan
    padding = [w // 2 * pads for w in window_size]
    args, images = (window_size, stride, padding, ceil_mode), x.double().permute(0, 3, 1, 2)
    if means is None:
        expected = F.max_pool2d(images, *args[:3], ceil_mode=ceil_mode)
    else:
        expected = F.avg_pool2d(images, *args, count_include_pad=means)
    counted = (means is not None, bool(means))
    out = window_pool(x, window_size, [stride] * 2, padding, expected.shape[2:], *counted)
    expected = expected.permute(0, 2, 3, 1)
    assert torch.equal(out.isnan(), expected.isnan())
    _assert_near(out.nan_to_num(), expected.nan_to_num())


def test_means_of_many_pixels_keep_their_digits() -> None:
    x = 1 + random(1, 512, 512, 16).float() * 1e-3
    outs = []
    for threads in (1, 2):
        with using_threads(threads):
            outs.append(window_means(x, (512, 512)))
    assert torch.equal(*outs)
    assert (outs[0] - _plain(x, (512, 512))).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 3), (14, 9)])
def test_pooling_of_windows_of_one_size(size) -> None:
    pool = FastAdaptiveAvgPool2d(size)
    x = random(2, 40, 14, 18).float()
    for laid_out in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(pool(laid_out), F.adaptive_avg_pool2d(x, size))


def test_ties_are_rounded_to_even() -> None:
    x = (1 + torch.arange(64) / 128).view(1, 16, 2, 2).bfloat16()
    half = torch.full_like(x, 2.0**-8)  # of the last place
    assert torch.equal(nhwc_from_nchw(half, x), half + x)
