"""The RMS norm in one precision and in two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ops.norm import RMSNorm


@pytest.fixture(autouse=True)
def every_warning() -> Iterator[None]:
    """Warnings that torch gives once in a process come every time, as errors here."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def _made(dtype: torch.dtype) -> tuple[RMSNorm, torch.Tensor]:
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-6)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm, torch.randn(3, 5, 24).to(dtype)


def test_one_precision_is_torchs() -> None:
    norm, x = _made(torch.float32)
    assert torch.equal(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-6))
    assert torch.equal(RMSNorm(24, elementwise_affine=False)(x), nn.RMSNorm(24)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_two_precisions(dtype: torch.dtype) -> None:
    """The output is the exact one, rounded once; so are the gradients."""
    norm, x = _made(dtype)
    exact, exact_x = nn.RMSNorm(24, eps=1e-6).double(), x.double().requires_grad_()
    exact.load_state_dict(norm.state_dict())
    expected = exact(exact_x)
    out = norm(x.requires_grad_())
    assert out.dtype == dtype
    unit = max(torch.finfo(dtype).eps, 1e-7)
    torch.testing.assert_close(out.double(), expected, rtol=unit, atol=1e-7)
    weights = torch.randn_like(expected).to(dtype)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert norm.weight.grad.dtype == torch.float32 and x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=2 * unit, atol=unit)
    torch.testing.assert_close(norm.weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-5)


def test_under_autocast_like_layer_norm() -> None:
    norm, x = _made(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == nn.LayerNorm(24)(x).dtype == torch.bfloat16
        assert norm(x.float()).dtype == nn.LayerNorm(24)(x.float()).dtype == torch.float32
