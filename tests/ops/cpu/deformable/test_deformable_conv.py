"""Deformable convolution in one pass against torchvision's in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from compiled_kernels import LINEAR_DTYPES, random, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import deform_conv2d

from ops.cpu.deformable.deformable_conv import deformable_conv2d, pack_taps


def _problem(
    batch: int, size: tuple[int, int], channels: tuple[int, int], kernel: int, stride: int
) -> list[Tensor]:
    """Map, offsets, weight and bias."""
    side = [(n - kernel) // stride + 1 for n in size]
    shapes = [(batch, channels[0], *size), (batch, 2 * kernel**2, *side)]
    shapes += [(channels[1], channels[0], kernel, kernel), (channels[1],)]
    x, offset, weight, bias = (random(*shape, seed=i).float() for i, shape in enumerate(shapes))
    return [x, 2 * offset, weight, bias]


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(3, 19), st.integers(3, 23)),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    last=st.booleans(),
    activation=st.sampled_from(["none", "gelu"]),
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
)
def test_is_that_of_torchvision(
    batch, size, channels, kernel, stride, last, activation, dtype
) -> None:
    *maps, bias = _problem(batch, size, channels, kernel, stride)
    x, offset, weight = (t.to(dtype) for t in maps)
    expected = deform_conv2d(*(t.double() for t in (x, offset, weight, bias)), stride=stride)
    expected = F.gelu(expected) if activation == "gelu" else expected
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    out = deformable_conv2d(x, offset, pack_taps(weight), bias, kernel, stride, activation)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    assert (out - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def test_pieces_and_threads() -> None:
    x, offset, weight, bias = _problem(2, (64, 51), (130, 70), 2, 2)
    expected = deform_conv2d(x, offset, weight, bias, stride=2)
    for threads in (1, 3):
        with using_threads(threads):
            out = deformable_conv2d(x, offset, pack_taps(weight), bias, 2, 2)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_extreme_offsets_read_zeros() -> None:
    x, offset, weight, bias = _problem(1, (4, 4), (8, 8), 2, 2)
    for wild in (1e30, -1e30, float("inf")):
        out = deformable_conv2d(x, torch.full_like(offset, wild), pack_taps(weight), bias, 2, 2)
        torch.testing.assert_close(out, bias.view(1, -1, 1, 1).expand_as(out))


def test_nan_offsets_are_ignored() -> None:
    """There lies the NaN that it came of, and zero is what is beyond the border."""
    x, offset, weight, bias = _problem(1, (6, 6), (5, 7), 2, 2)
    offset.zero_()
    wanted = deform_conv2d(x, offset, weight, bias, stride=2)
    offset[:, :3, 1:] = float("nan")
    out = deformable_conv2d(x, offset, pack_taps(weight), bias, 2, 2)
    torch.testing.assert_close(out, wanted)
    x[0, 2, 5, 5] = float("nan")
    out = deformable_conv2d(x, offset, pack_taps(weight), bias, 2, 2)
    assert out.isnan().any(1).nonzero().tolist() == [[0, 2, 2]]
