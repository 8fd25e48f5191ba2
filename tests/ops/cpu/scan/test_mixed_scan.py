"""The kernel of ViG's attention against its parts in float64; bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu.scan.gated_scan import mixed_scan
from ops.linear_attention import gated_linear_attention


def error(dtype: torch.dtype, activation: str, tokens: int, dim: int, num_heads: int) -> float:
    """The greatest, over the greatest exact value."""
    torch.manual_seed(0)
    given = torch.randn(2, tokens, 3 * dim + 5), 20 * torch.randn(2, tokens, dim)
    projected, decay, local = (t.to(dtype) for t in (*given, torch.randn(2, tokens, dim)))
    norm, local_norm = torch.rand(2, dim // num_heads) + 0.5
    out = mixed_scan(projected, decay, local, norm, local_norm, num_heads, 1e-6, activation)
    assert out.dtype == dtype

    def heads(t: Tensor) -> Tensor:
        return t.double().unflatten(-1, (num_heads, -1))

    half, width = dim // 2, (dim // num_heads,)
    parts = projected[..., : 3 * dim].split([half, half, dim, dim], dim=-1)
    query, key, value, gate = map(heads, parts)
    ahead, back = map(heads, (F.logsigmoid(decay.double()) / 16).chunk(2, dim=-1))
    scanned = gated_linear_attention(query, key, value, ahead, back, scale=1.0)
    share = gate.sigmoid()
    expected = share * F.rms_norm(scanned, width, norm.double(), 1e-6)
    expected += (1 - share) * F.rms_norm(heads(local), width, local_norm.double(), 1e-6)
    expected = expected.flatten(2)
    if activation == "silu":
        expected = F.silu(expected)
    return ((out - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("tokens", "dim", "num_heads"), [(1, 64, 1), (50, 96, 3), (33, 20, 2)])
def test_equals_its_parts(dtype, activation, tokens, dim, num_heads):
    tolerance = 3e-6 if dtype == torch.float32 else 2**-8
    assert error(dtype, activation, tokens, dim, num_heads) < tolerance


@pytest.mark.parametrize("logit", [-2000.0, -100.0, -1e-30, 0.0, 1e-30, 100.0, 2000.0])
def test_extreme_logits(logit):
    """Of the gates and of the shares of what was scanned."""
    projected = torch.ones(1, 40, 3)
    projected[..., 2] = logit
    decay, local, one = torch.full((1, 40, 2), logit), torch.zeros(1, 40, 1), torch.ones(1)
    projected, local = projected.repeat_interleave(2, -1), local.repeat(1, 1, 2)
    out = mixed_scan(projected, decay, local, one.repeat(2), one.repeat(2), 1, 1e-6)
    gate = torch.tensor(logit, dtype=torch.float64).sigmoid() ** (1 / 16)
    kept = gate ** torch.arange(40)
    scanned = kept.cumsum(0) + kept.cumsum(0).flip(0)
    expected = torch.tensor(logit).sigmoid() * scanned / (scanned.square() + 1e-6).sqrt()
    torch.testing.assert_close(out[0, :, 0].double(), expected, atol=1e-6, rtol=1e-5)


def test_refuses_what_does_not_fit() -> None:
    x, weight = torch.zeros(1, 4, 8), torch.ones(4)
    wide = torch.zeros(1, 4, 24)
    with pytest.raises(ValueError, match="24 channels or more"):
        mixed_scan(x, x, x, weight, weight, 2, 1e-6)
    with pytest.raises(ValueError, match=r"decay must be \(1, 4, 8\)"):
        mixed_scan(wide, wide, x, weight, weight, 2, 1e-6)
    with pytest.raises(ValueError, match="norms must have 4 weights"):
        mixed_scan(wide, x, x, torch.ones(8), weight, 2, 1e-6)
    with pytest.raises(ValueError, match="'none' or 'silu', got 'gelu'"):
        mixed_scan(wide, x, x, weight, weight, 2, 1e-6, "gelu")
