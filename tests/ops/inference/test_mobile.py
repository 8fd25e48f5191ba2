"""Feed-forwards of the mobile networks as fuse() makes them, against their layers."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_kernels import LINEAR_DTYPES, using_threads, without_kernels
from torch import Tensor, nn

from ops.inference.conversion import to_channels_last
from ops.inference.mobile import FastConvFFN, FastResidual
from ops.mobile import ConvFFN, Residual
from ops.reparam import fuse_children


def _both(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A residual feed-forward as it was, and its fast form."""
    torch.manual_seed(0)
    plain = nn.Sequential(Residual(ConvFFN(24, 48))).eval()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    fuse_children(plain)
    plain = plain.to(dtype).requires_grad_(False)
    fast = copy.deepcopy(plain)
    to_channels_last(fast, always=False)
    assert type(fast[0]) is FastResidual and type(fast[0].fn) is FastConvFFN
    return plain, fast


def _image(batch: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 24, *size).to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
def test_alternating_map_sizes(dtype: torch.dtype) -> None:
    plain, fast = _both(dtype)
    bound = 4 * LINEAR_DTYPES[dtype]
    for _ in range(2):
        for batch, size in ((1, (1, 1)), (2, (7, 5)), (8, (20, 31)), (0, (3, 3))):
            x = _image(batch, size, dtype)
            for image in (x, x.contiguous()):
                expected = plain.double()(image.double())
                plain.to(dtype)
                assert (fast(image) - expected).abs().le(bound * (1 + expected.abs())).all()
    x = _image(2, (7, 5), dtype)
    alone = fast[0].fn(x)
    with using_threads(2):
        assert torch.equal(fast[0].fn(x), alone)
    torch.testing.assert_close(alone + x, fast(x), rtol=2 * bound, atol=2 * bound)


def test_new_weights_dispatch_and_no_kernel(monkeypatch) -> None:
    plain, fast = _both()
    x = _image(2, (7, 5), torch.float32)
    for _ in range(2):
        torch.testing.assert_close(fast(x), plain(x))
        with torch.autograd.profiler.profile():
            torch.testing.assert_close(fast(x), plain(x))
        for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
            p.mul_(1.5)
            q.mul_(1.5)
    for ffn in (plain[0].fn, fast[0].fn):  # by hand, and as a copy
        ffn.fc2.weight = nn.Parameter(ffn.fc2.weight.detach() * 2, requires_grad=False)
    torch.testing.assert_close(fast(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(fast)(x), plain(x))
    rows = torch.vmap(lambda image: fast(image[None])[0])(x)
    torch.testing.assert_close(rows, plain(x))
    without_kernels(monkeypatch)
    plain, fast = _both()
    torch.testing.assert_close(fast(x), plain(x))
