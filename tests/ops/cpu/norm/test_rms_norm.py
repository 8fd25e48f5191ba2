"""The RMS norm kernel against float64, and the layers that call it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import random, without_kernels
from timm.layers import RmsNorm2d
from torch import nn

from ops.cpu.norm.rms_norm import rms_norm
from ops.inference.layers import convert
from ops.inference.norm import FastRMSNorm, FastRmsNorm2d
from ops.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 40, 65, 300])
def test_is_the_norm(dtype, dim):
    x, weight = random(3, 7, dim).to(dtype), random(dim, seed=1)
    expected = F.rms_norm(x.double(), (dim,), weight, 1e-3)
    out = rms_norm(x, weight.float(), 1e-3)
    assert out.dtype == dtype and out.is_contiguous()
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


@torch.inference_mode()
def test_layers():
    x = random(2, 12, 5, 7).float()
    norm, norm2d = RMSNorm(7, eps=0.5), RmsNorm2d(12, eps=0.2)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm2d.weight)
    expected = norm(x), norm2d(x)
    fast, fast2d = convert(norm, FastRMSNorm), convert(norm2d, FastRmsNorm2d)
    torch.testing.assert_close(fast(x), expected[0])
    torch.testing.assert_close(fast2d(x), expected[1])


@torch.inference_mode()
def test_forms_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    norm, norm2d = RMSNorm(7, eps=1e-6), RmsNorm2d(12, eps=1e-6)
    x, x2d = torch.randn(2, 5, 7), torch.randn(2, 12, 3, 4)
    expected, expected2d = norm(x), norm2d(x2d)
    assert torch.equal(convert(norm, FastRMSNorm)(x), expected)
    assert torch.equal(convert(norm2d, FastRmsNorm2d)(x2d), expected2d)


def test_rejects_bad_arguments():
    x, ones = torch.zeros(2, 3), torch.ones(3)
    assert rms_norm(x[:0], ones, 1e-6).shape == (0, 3)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2,\)"):
        rms_norm(x, ones[:2], 1e-6)
    with pytest.raises(ValueError, match="weight must be torch.float32"):
        rms_norm(x, ones.double(), 1e-6)
