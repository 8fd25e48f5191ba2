"""Gated attention over all tokens, by a softmax or linear, against its steps in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import apply_rot_embed
from torch import Tensor

from ops.attention.rank_augmented import rank_augmented_linear_attention, rotary_table
from ops.cpu.attention.gated import (
    gated_attention,
    heads_unavailable,
    rank_augmented_attention,
)
from ops.inference.attention import axis_rotations

KERNELS = {"softmax": gated_attention, "linear": rank_augmented_attention}
every_kind = pytest.mark.parametrize("kind", KERNELS)


def _attend(kind: str, qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    head_dim = bias.shape[3] // num_heads
    tables = (axis_rotations(size, head_dim, axis) for axis, size in enumerate(bias.shape[1:3]))
    out: Tensor = KERNELS[kind](qkvo, bias, *tables, num_heads)
    return out


def _inputs(batch: int, size: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(batch, *size, 4 * dim), torch.randn(batch, *size, dim)


def _exact(kind: str, qkvo: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    rotary = rotary_table(*bias.shape[1:3], bias.shape[3] // num_heads, dtype=torch.float64)
    parts = qkvo.double().flatten(1, 2).unflatten(-1, (4, num_heads, -1)).permute(2, 0, 3, 1, 4)
    if kind == "linear":
        out = rank_augmented_linear_attention(*parts[:3], rotary)
    else:
        query, key = (apply_rot_embed(t, *rotary) for t in parts[:2])
        out = F.scaled_dot_product_attention(query, key, parts[2])
    return (out.transpose(1, 2).reshape(bias.shape) + bias.double()) * qkvo.double().chunk(4, -1)[3]


@settings(max_examples=80)
@given(
    kind=st.sampled_from(list(KERNELS)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 23)),
    head_dim=st.sampled_from([32, 64, 96, 160]),
    num_heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_steps_one_by_one(kind, batch, size, head_dim, num_heads, dtype) -> None:
    qkvo, bias = (t.to(dtype) for t in _inputs(batch, size, head_dim * num_heads))
    expected = _exact(kind, qkvo, bias, num_heads)
    out = _attend(kind, qkvo, bias, num_heads)
    assert out.dtype == dtype and out.is_contiguous()
    # The plain linear form in single precision is as far from it as 4e-6.
    bound = 4e-6 if dtype == torch.float32 else 2**-8
    assert (out - expected).abs().max() <= bound * (1 + expected.abs().max())


@every_kind
@pytest.mark.parametrize("batch", [1, 4])
def test_threads_and_maps_of_many_tokens(batch: int, kind: str) -> None:
    qkvo, bias = _inputs(batch, (29, 27), 128)
    expected = _exact(kind, qkvo, bias, 2)
    for threads in (1, 2, 3):
        with using_threads(threads):
            outs = [_attend(kind, qkvo, bias, 2) for _ in range(2)]
        assert (outs[0] - expected).abs().max() <= 4e-6 * expected.abs().max()
        assert torch.equal(*outs)


def test_large_numbers() -> None:
    """The softmax over the tokens and the features of very negative keys stay finite."""
    qkvo, bias = _inputs(1, (9, 9), 32)
    expected = _exact("linear", 50 * qkvo, bias, 1)
    out = _attend("linear", 50 * qkvo, bias, 1)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_kind
def test_rejects_bad_arguments(kind: str) -> None:
    qkvo, bias = _inputs(1, (3, 3), 48)
    said = "the kernel needs head dims divisible by 32, not 48"
    assert heads_unavailable(48) == said
    with pytest.raises(RuntimeError, match=said):
        _attend(kind, qkvo, bias, 1)
    with pytest.raises(ValueError, match=r"qkvo must be \(1, 3, 3, 128\), got"):
        _attend(kind, qkvo, bias[..., :32], 1)
