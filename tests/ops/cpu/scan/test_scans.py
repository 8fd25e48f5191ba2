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
from ops.cpu.wkv.bi_wkv import bi_wkv_forward
from ops.cpu.wkv.shift import shifted_mixtures
from ops.linear_attention import gated_linear_attention


# ---- ViG's attention -----------------------------------------------------------------------------
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


# ---- VRWKV6's attention --------------------------------------------------------------------------
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


def error_of_normed(dtype: torch.dtype, *sizes: int) -> float:
    """The largest, relative to the largest exact value."""
    given = arguments(dtype, *sizes)
    out, exact = normed_scan(*given, 1e-3), expected(*given)
    assert out.dtype == dtype and out.is_contiguous()
    return ((out - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 64, 64), (50, 3, 64, 64), (33, 2, 10, 21)])
def test_normed_scan_equals_its_parts(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    assert error_of_normed(dtype, *sizes) < (1e-5 if dtype == torch.float32 else 2**-8)


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


# ---- bi-WKV --------------------------------------------------------------------------------------
def inputs(tokens: int = 30, dim: int = 21, batch: int = 2) -> list[Tensor]:
    key, value = random(2, batch, tokens, dim).float()
    decay, first = random(2, dim, seed=1).float() / tokens
    return [key, value, decay, first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [0, 4])
def test_a_gate(dtype: torch.dtype, segments: int) -> None:
    key, value, decay, first = inputs()
    key, value, gate = (t.to(dtype) for t in (key, value, 5 * random(2, 30, 21, seed=2)))
    exact = [t.double() for t in (key, value, decay, first)]
    expected = gate.double().sigmoid() * bi_wkv(*exact, segments or None, "reference")
    out = bi_wkv_forward(key, value, decay, first, gate, segments)
    assert out.dtype == dtype
    bound = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)


def test_a_gate_has_a_gradient_and_saturates() -> None:
    key, value, decay, first = (t.requires_grad_() for t in inputs())
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
    key, value, decay, first = inputs(40, 8)
    mild = bi_wkv_forward(key, value, decay, first, None, 0)
    decay[3] = 50.0
    wild = bi_wkv_forward(key, value, decay, first, None, 0)
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(wild[..., others], mild[..., others], rtol=2e-6, atol=2e-6)


def test_nan_propagates() -> None:
    key, value, decay, first = inputs()
    key[0, 3, 5] = torch.nan
    out = bi_wkv_forward(key, value, decay, first, None, 0)
    assert out[0, :, 5].isnan().all()
    assert out.isnan().sum() == 30


def test_opcheck() -> None:
    tokens = [t.requires_grad_() for t in inputs(5, 3)]
    torch.library.opcheck(torch.ops.vision_backbones.bi_wkv_forward, (*tokens, None, 3))
    detached = [t.detach() for t in tokens]
    grad = torch.ones_like(detached[0])
    torch.library.opcheck(torch.ops.vision_backbones.bi_wkv_backward, (grad, *detached, 3))


def test_no_second_derivative() -> None:
    tokens = [t.requires_grad_() for t in inputs(9, 5)]
    out = bi_wkv(*tokens, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), tokens[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- mixtures of pixels with their neighbours ----------------------------------------------------
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
