"""Kernels of scans and of the mixtures before them, with what is fused into them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import random
from torch import Tensor

from backbones.vrwkv.blocks import shift
from ops.bi_wkv import bi_wkv
from ops.cpu.scan.gated_scan import mixed_scan, normed_scan
from ops.cpu.wkv.wkv import bi_wkv_forward, shifted_mixtures
from ops.linear_attention import gated_linear_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _error(out: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest exact value."""
    return ((out - expected).abs().max() / expected.abs().max()).item()


# ---- ViG's attention -----------------------------------------------------------------------------
@DTYPES
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("tokens", "dim", "num_heads"), [(1, 64, 1), (50, 96, 3), (33, 20, 2)])
def test_equals_its_parts(dtype, activation, tokens, dim, num_heads) -> None:
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
    expected = F.silu(expected) if activation == "silu" else expected
    assert _error(out, expected.flatten(2)) < (3e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("logit", [-2000.0, -100.0, -1e-30, 0.0, 1e-30, 100.0, 2000.0])
def test_extreme_logits(logit: float) -> None:
    """Of the gates and of the shares of what was scanned."""
    projected, norm = torch.ones(1, 40, 6), torch.ones(2)
    projected[..., 4:] = logit
    decay, local = torch.full((1, 40, 2), logit), torch.zeros(1, 40, 2)
    out = mixed_scan(projected, decay, local, norm, norm, 1, 1e-6)
    gate = torch.tensor(logit, dtype=torch.float64).sigmoid() ** (1 / 16)
    kept = gate ** torch.arange(40)
    scanned = kept.cumsum(0) + kept.cumsum(0).flip(0)
    expected = torch.tensor(logit).sigmoid() * scanned / (scanned.square() + 1e-6).sqrt()
    torch.testing.assert_close(out[0, :, 0].double(), expected, atol=1e-6, rtol=1e-5)


# ---- VRWKV6's attention --------------------------------------------------------------------------
def _arguments(dtype: torch.dtype, *sizes: int) -> list[Tensor]:
    """Of tokens, heads, and channels of a head's keys and values."""
    *tokens, dim, value_dim = (2, *sizes)
    widths = (dim, dim, value_dim, dim)
    sequences = [random(*tokens, width, seed=i).to(dtype) for i, width in enumerate(widths)]
    vectors = [
        random(tokens[2], width, seed=i).float()
        for i, width in enumerate((dim, dim, value_dim, value_dim), 4)
    ]
    return [*sequences, vectors[0] - 1, *vectors[1:]]


def _normed(*given: Tensor) -> Tensor:
    query, key, value, decay, decay_bias, bonus, weight, bias = (t.double() for t in given)
    gate = -(decay + decay_bias).exp()
    scanned = gated_linear_attention(query, key, value, gate, gate, bonus, scale=1.0)
    return F.layer_norm(scanned, scanned.shape[-1:], eps=1e-3) * weight + bias


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 64, 64), (50, 3, 64, 64), (33, 2, 10, 21)])
def test_normed_scan_equals_its_parts(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    given = _arguments(dtype, *sizes)
    out = normed_scan(*given, 1e-3)
    assert out.dtype == dtype and out.is_contiguous()
    assert _error(out, _normed(*given)) < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("logit", [-200.0, -1e-30, 4.0, 80.0, 1e4, torch.inf, -torch.inf])
def test_extreme_decays(logit: float) -> None:
    """From gates of 1 to those of 0."""
    given = _arguments(torch.float32, 20, 1, 4, 8)
    given[3] = torch.full_like(given[3], logit)
    out = normed_scan(*given, 1e-3).double()
    torch.testing.assert_close(out, _normed(*given), atol=1e-4, rtol=1e-4)


def test_nan_stays() -> None:
    given = _arguments(torch.float32, 20, 1, 4, 8)
    given[3][0, 7] = torch.nan
    assert normed_scan(*given, 1e-3)[0, 8:].isnan().all()


# ---- bi-WKV --------------------------------------------------------------------------------------
def _inputs(tokens: int = 30, dim: int = 21) -> list[Tensor]:
    key, value = random(2, 2, tokens, dim).float()
    decay, first = random(2, dim, seed=1).float() / tokens
    return [key, value, decay, first]


@DTYPES
@pytest.mark.parametrize("segments", [0, 4])
def test_a_gate(dtype: torch.dtype, segments: int) -> None:
    key, value, decay, first = _inputs()
    key, value, gate = (t.to(dtype) for t in (key, value, 5 * random(2, 30, 21, seed=2)))
    exact = [t.double() for t in (key, value, decay, first)]
    expected = gate.double().sigmoid() * bi_wkv(*exact, segments or None, "reference")
    out = bi_wkv_forward(key, value, decay, first, gate, segments)
    assert out.dtype == dtype
    bound = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)


def test_a_gate_has_a_gradient_and_saturates() -> None:
    key, value, decay, first = (t.requires_grad_() for t in _inputs())
    gate = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4]).repeat(2, 30, 5)[..., :21].requires_grad_()
    out = torch.ops.vision_backbones.bi_wkv_forward(key, value, decay, first, gate, 4)
    expected = bi_wkv(key, value, decay, first, 4) * gate.sigmoid()
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        kernel = bi_wkv_forward(key, value, decay, first, gate, 4)
    torch.testing.assert_close(kernel, expected, rtol=2e-6, atol=2e-6)
    got, want = (torch.autograd.grad(o.square().sum(), [key, gate]) for o in (out, expected))
    torch.testing.assert_close(got, want)


def test_extreme_decays_stay_within_their_channel() -> None:
    """Blocks of channels are computed in one of two ways, as their decays want."""
    key, value, decay, first = _inputs(40, 8)
    mild = bi_wkv_forward(key, value, decay, first, None, 0)
    decay[3] = 50.0
    wild = bi_wkv_forward(key, value, decay, first, None, 0)
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(wild[..., others], mild[..., others], rtol=2e-6, atol=2e-6)


def test_nan_propagates() -> None:
    key, value, decay, first = _inputs()
    key[0, 3, 5] = torch.nan
    out = bi_wkv_forward(key, value, decay, first, None, 0)
    assert out[0, :, 5].isnan().all()
    assert out.isnan().sum() == 30


def test_no_second_derivative() -> None:
    tokens = [t.requires_grad_() for t in _inputs(9, 5)]
    torch.library.opcheck(torch.ops.vision_backbones.bi_wkv_forward, (*tokens, None, 3))
    out = bi_wkv(*tokens, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), tokens[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- mixtures of pixels with their neighbours ----------------------------------------------------
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (1, 14, 14), (3, 1, 4)])
@pytest.mark.parametrize(("dim", "groups"), [(12, 1), (24, 3), (128, 2), (72, 1)])
@DTYPES
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
