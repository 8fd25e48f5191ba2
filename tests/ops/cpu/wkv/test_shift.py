"""Mixtures of pixels with their neighbours: the kernel against the plain layer's function."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import random

from backbones.vrwkv.blocks import shift
from ops.cpu.wkv.shift import shifted_mixtures


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (1, 14, 14), (3, 1, 4)])
@pytest.mark.parametrize(("dim", "groups"), [(12, 1), (24, 3), (128, 2), (72, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures(size: tuple[int, ...], dim: int, groups: int, dtype: torch.dtype) -> None:
    x = random(*size, dim).to(dtype)
    exact, shifted = x.double(), shift(x.double(), groups)
    for count in (1, 2, 3):
        shares = random(count, dim, seed=count).float()
        expected = torch.stack([exact * s + shifted * (1 - s) for s in shares.double()])
        out = shifted_mixtures(x, shares, groups)
        assert out.dtype == dtype and out.is_contiguous()
        bound = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)


def test_rejects_bad_arguments() -> None:
    x, shares = random(1, 3, 3, 12).float(), random(2, 12, seed=1).float()
    for arguments, words in (
        ((x[0], shares), r"\(3, 3, 12\)"),
        ((x, shares[:, 1:]), r"\(2, 11\)"),
        ((x, shares.repeat(2, 1)), "got 4"),
        ((x, shares[:0]), "got 0"),
        ((x, shares, 2), "groups 2"),
        ((x, shares.double()), "torch.float64"),
    ):
        with pytest.raises(ValueError, match=words):
            shifted_mixtures(*arguments)
