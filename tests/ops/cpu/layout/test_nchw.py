"""NHWC to NCHW and back, against torch; bad arguments."""

from __future__ import annotations

import torch
from compiled_kernels import random, using_threads
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
