"""Gated linear attention in few passes against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.attention.rank_augmented import rank_augmented_linear_attention, rotary_table
from ops.cpu.attention.linear import rank_augmented_attention, unavailable
from ops.inference.attention import axis_rotations


def _exact(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    *qkv, gate = qkvo.double().chunk(4, dim=-1)
    height, width, dim = bias.shape[1:]
    query, key, value = (
        t.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv
    )
    rotary = rotary_table(height, width, dim // num_heads, dtype=torch.float64)
    out = rank_augmented_linear_attention(query, key, value, rotary)
    return (out.transpose(1, 2).reshape(bias.shape) + bias.double()) * gate


def _attend(qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    head_dim = bias.shape[3] // num_heads
    tables = (axis_rotations(size, head_dim, axis) for axis, size in enumerate(bias.shape[1:3]))
    out: Tensor = rank_augmented_attention(qkvo, bias, *tables, num_heads)
    return out


def _random(batch: int, size: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(batch, *size, 4 * dim), torch.randn(batch, *size, dim)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 23)),
    head_dim=st.sampled_from([32, 64, 96, 160]),
    num_heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_is_the_definition(batch, size, head_dim, num_heads, dtype) -> None:
    qkvo, bias = (t.to(dtype) for t in _random(batch, size, head_dim * num_heads))
    expected = _exact(qkvo, bias, num_heads)
    out = _attend(qkvo, bias, num_heads)
    assert out.dtype == dtype
    # The plain form in single precision is as far from it as 4e-6.
    bound = 4e-6 if dtype == torch.float32 else 2**-8
    assert (out - expected).abs().max() <= bound * (1 + expected.abs().max())


@pytest.mark.parametrize("batch", [1, 4])
def test_threads(batch: int) -> None:
    qkvo, bias = _random(batch, (40, 37), 128)
    expected = _exact(qkvo, bias, 2)
    for threads in (1, 2, 3):
        with using_threads(threads):
            out = _attend(qkvo, bias, 2)
            assert (out - expected).abs().max() <= 4e-6 * expected.abs().max()
            assert torch.equal(_attend(qkvo, bias, 2), out)


def test_large_numbers() -> None:
    """The softmax over the tokens and the features of very negative keys stay finite."""
    qkvo, bias = _random(1, (9, 9), 32)
    expected = _exact(50 * qkvo, bias, 1)
    out = _attend(50 * qkvo, bias, 1)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rejects_bad_arguments() -> None:
    qkvo, bias = _random(1, (3, 3), 48)
    reason = unavailable(qkvo.device, qkvo.dtype, 48)
    assert reason == "the kernel needs head dims divisible by 32, not 48"
    with pytest.raises(RuntimeError, match="divisible by 32, not 48"):
        _attend(qkvo, bias, 1)
    with pytest.raises(ValueError, match=r"qkvo must be contiguous and \(1, 3, 3, 128\)"):
        _attend(qkvo, bias[..., :32], 1)
    with pytest.raises(ValueError, match="bias must be torch.float32 .* got torch.bfloat16"):
        _attend(qkvo, bias.bfloat16(), 1)
    with pytest.raises(ValueError, match="5 heads divide its 48 channels"):
        rank_augmented_attention(qkvo, bias, *[axis_rotations(3, 8, 0)] * 2, 5)
    with pytest.raises(ValueError, match=r"column_table must be \(3, 32\).* got \(4, 32\)"):
        qkvo, bias = _random(1, (3, 3), 32)
        rank_augmented_attention(qkvo, bias, axis_rotations(3, 32, 0), axis_rotations(4, 32, 1), 1)
    assert "float64" in (unavailable(qkvo.device, torch.float64, 32) or "")
