"""NHWC to NCHW and back, against torch; bad arguments."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import random, using_threads, without_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cpu.layout.nchw import nchw_from_nhwc, nhwc_from_nchw


def _split(x: Tensor, affine: Tensor) -> Tensor:
    """In float64."""
    scale, shift = affine.double()[:, :, None, None]
    return x.double() * scale + shift


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    channels=st.sampled_from([1, 7, 16, 40, 130]),
    channels_last=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_split_and_joined(dtype, batch, size, channels, channels_last, threads) -> None:
    x, other = random(2, batch, channels, *size).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, other = (t.contiguous(memory_format=layout) for t in (x, other))
    affine = random(2, channels).float()
    with using_threads(threads):
        planes, joined = nchw_from_nhwc(x, affine), nhwc_from_nchw(other, x)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(planes.double(), _split(x, affine), rtol=tolerance, atol=tolerance)
    assert planes.dtype == dtype and planes.is_contiguous()
    assert torch.equal(joined, other + x)
    assert joined.is_contiguous(memory_format=torch.channels_last)


def test_rejects_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(1, 8, 3, 4).float()
    with pytest.raises(ValueError, match=r"affine must be \(2, 8\), got \(2, 7\)"):
        nchw_from_nhwc(x, torch.ones(2, 7))
    with pytest.raises(ValueError, match="affine must be torch.float32"):
        nchw_from_nhwc(x, torch.ones(2, 8).double())
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) of float32 or bfloat16"):
        nchw_from_nhwc(x[0], torch.ones(2, 8))
    with pytest.raises(ValueError, match="nchw must be torch.float32, got torch.bfloat16"):
        nhwc_from_nchw(x.bfloat16(), x)
    with pytest.raises(ValueError, match=r"nchw must be \(1, 8, 3, 4\), got \(1, 8, 4, 3\)"):
        nhwc_from_nchw(x.transpose(2, 3), x)
    assert "float64" in str(nchw_from_nhwc.unavailable(torch.device("cpu"), torch.float64))
    without_kernels(monkeypatch)
    with pytest.raises(RuntimeError, match="the kernel nhwc_from_nchw is not available"):
        nhwc_from_nchw(x, x)
