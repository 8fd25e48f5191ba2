"""Gated softmax attention in one pass against the plain layers' steps in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import apply_rot_embed
from torch import Tensor

from ops.attention.rank_augmented import rotary_table
from ops.cpu.attention.gated import gated_attention, unavailable
from ops.inference.attention import axis_rotations


def _attend(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    head_dim = bias.shape[3] // num_heads
    tables = (axis_rotations(size, head_dim, axis) for axis, size in enumerate(bias.shape[1:3]))
    out: Tensor = gated_attention(qkvo, bias, *tables, num_heads)
    return out


def _inputs(batch: int, size: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(batch, *size, 4 * dim), torch.randn(batch, *size, dim)


def _by_steps(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    rotary = rotary_table(*bias.shape[1:3], bias.shape[3] // num_heads, dtype=torch.float64)
    parts = qkvo.double().flatten(1, 2).unflatten(-1, (4, num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = (apply_rot_embed(t, *rotary) for t in parts[:2])
    out = F.scaled_dot_product_attention(query, key, parts[2]).transpose(1, 2)
    return (out.reshape(bias.shape) + bias.double()) * qkvo.chunk(4, dim=-1)[3].double()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 23)),
    head_dim=st.sampled_from([32, 64, 96]),
    num_heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_steps_one_by_one(batch, size, head_dim, num_heads, dtype) -> None:
    qkvo, bias = (t.to(dtype) for t in _inputs(batch, size, head_dim * num_heads))
    expected = _by_steps(qkvo, bias, num_heads)
    out = _attend(qkvo, bias, num_heads)
    assert out.dtype == dtype and out.is_contiguous()
    bound = 4e-6 if dtype == torch.float32 else 2**-8
    assert (out - expected).abs().max() <= bound * (1 + expected.abs().max())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_maps_of_many_tokens(threads: int) -> None:
    qkvo, bias = _inputs(2, (29, 27), 64)
    expected = _by_steps(qkvo, bias, 2)
    with using_threads(threads):
        out = _attend(qkvo, bias, 2)
        assert (out - expected).abs().max() <= 4e-6 * expected.abs().max()
        assert torch.equal(_attend(qkvo, bias, 2), out)


def test_rejects_bad_arguments() -> None:
    qkvo, bias = _inputs(1, (3, 3), 48)
    assert "32 divides, not 48" in (unavailable(qkvo.device, qkvo.dtype, 48) or "")
    with pytest.raises(RuntimeError, match="32 divides, not 48"):
        _attend(qkvo, bias, 1)
    with pytest.raises(ValueError, match=r"qkvo must be contiguous and \(1, 3, 3, 128\)"):
        _attend(qkvo, bias[..., :32], 1)
