"""The kernel of VRWKV6's attention against its parts in float64; bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu.scan.gated_scan import normed_scan
from ops.linear_attention import gated_linear_attention


def arguments(dtype: torch.dtype, tokens: int, heads: int, dim: int, value_dim: int) -> list:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys, values = (2, tokens, heads, dim), (2, tokens, heads, value_dim)
    sequences = [normal(*shape).to(dtype) for shape in (keys, keys, values, keys)]
    vectors = [normal(*shape[2:]) for shape in (keys, keys, values, values)]
    return [*sequences, vectors[0] - 1, *vectors[1:]]


def expected(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, decay_bias: Tensor, *rest: Tensor
) -> Tensor:
    bonus, weight, bias = (t.double() for t in rest)
    gate = -(decay.double() + decay_bias).exp()
    sequences = (t.double() for t in (query, key, value))
    scanned = gated_linear_attention(*sequences, gate, gate, bonus, scale=1.0)
    normed = F.layer_norm(scanned, scanned.shape[-1:], eps=1e-3)
    return normed * weight + bias


def error(dtype: torch.dtype, *sizes: int) -> float:
    """The largest, relative to the largest exact value."""
    given = arguments(dtype, *sizes)
    out, exact = normed_scan(*given, 1e-3), expected(*given)
    assert out.dtype == dtype and out.is_contiguous()
    return ((out - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 64, 64), (50, 3, 64, 64), (33, 2, 10, 21)])
def test_equals_its_parts(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    assert error(dtype, *sizes) < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("logit", [-200.0, -1e-30, 4.0, 80.0, 1e4, torch.inf, -torch.inf])
def test_extreme_decays(logit: float) -> None:
    """From gates of 1 to those of 0."""
    given = arguments(torch.float32, 20, 1, 4, 8)
    given[3] = torch.full_like(given[3], logit)
    out, exact = normed_scan(*given, 1e-3), expected(*given)
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)


def test_nan_stays() -> None:
    given = arguments(torch.float32, 20, 1, 4, 8)
    given[3][0, 7] = torch.nan
    assert normed_scan(*given, 1e-3)[0, 8:].isnan().all()


def test_refuses_what_does_not_fit() -> None:
    given = arguments(torch.float32, 5, 2, 4, 6)
    with pytest.raises(ValueError, match=r"query, key and decay must be \(B, L, heads, K\)"):
        normed_scan(given[0], *given[:3], *given[4:], 1e-3)
    with pytest.raises(ValueError, match=r"decay_bias and bonus must be \(2, 4\)"):
        normed_scan(*given[:5], given[6], *given[6:], 1e-3)
    with pytest.raises(ValueError, match="bonus"):
        normed_scan(*given[:5], given[5].double(), *given[6:], 1e-3)
    with pytest.raises(ValueError, match="decay"):
        normed_scan(*given[:3], given[3].bfloat16(), *given[4:], 1e-3)
