"""Attention within small maps in one pass against the layers one by one in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu.attention.cascaded import PackedCascadedAttention, cascaded_attention


class _Heads(nn.Module):
    """The parts of all heads."""

    def __init__(
        self, heads: int, head_dim: int, qk_dim: int, sides: Sequence[int], has_norm: bool
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qk_dim = qk_dim
        self.qkv = nn.ModuleList(
            nn.Conv2d(head_dim, 2 * qk_dim + head_dim, 1) for _ in range(heads)
        )
        self.convs = nn.ModuleList(
            nn.Conv2d(qk_dim, qk_dim, side, padding=side // 2, groups=qk_dim) for side in sides
        )
        self.norm = nn.GroupNorm(1, heads * head_dim) if has_norm else None
        if self.norm is not None:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.requires_grad_(False)

    def check(self, x: Tensor, table: Tensor | None = None) -> None:
        packed = PackedCascadedAttention(list(self.qkv), self.qk_dim, list(self.convs), self.norm)
        out, expected = packed(x, table), self.exact(x, table)
        bound = _BOUNDS[out.dtype] * (1 + expected.abs().max())
        assert out.is_contiguous() and (out - expected).abs().max() <= bound

    def exact(self, x: Tensor, table: Tensor | None) -> Tensor:
        """(N, H, W, dim) → (N, H, W, dim), in float64."""
        parts, x = copy.deepcopy(self).double(), x.double().permute(0, 3, 1, 2)
        head_dim = parts.qkv[0].in_channels
        outs: list[Tensor] = []
        for i, project in enumerate(parts.qkv):
            share = x[:, i * head_dim : (i + 1) * head_dim] + (outs[-1] if outs else 0)
            if parts.norm is not None:
                channels = slice(i * head_dim, (i + 1) * head_dim)
                share = F.group_norm(
                    share, 1, parts.norm.weight[channels], parts.norm.bias[channels]
                )
            query, key, value = project(share).split([parts.qk_dim, parts.qk_dim, head_dim], dim=1)
            if len(parts.convs):
                query = parts.convs[i](query)
            logits = query.flatten(2).transpose(1, 2) @ key.flatten(2) * parts.qk_dim**-0.5
            if table is not None:
                logits = logits + table[i].double().T
            mixed = value.flatten(2) @ logits.softmax(-1).transpose(1, 2)
            outs.append(mixed.view(value.shape))
        rest = x[:, len(outs) * head_dim :]
        return torch.cat((*outs, rest), dim=1).relu().permute(0, 2, 3, 1)


_BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@settings(max_examples=60)
@given(
    images=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(8, 70), st.integers(1, 20), st.integers(0, 20)),
    sides=st.sampled_from([(), (3, 5, 7), (1, 7, 3)]),
    has_norm=st.booleans(),
    has_table=st.booleans(),
    dtype=st.sampled_from(list(_BOUNDS)),
)
def test_equals_the_layers_one_by_one(
    images, size, heads, dims, sides, has_norm, has_table, dtype
) -> None:
    head_dim, qk_dim, rest = dims
    parts = _Heads(heads, head_dim, qk_dim, sides[:heads], has_norm)
    if cascaded_attention.unavailable(torch.device("cpu"), dtype) is not None:
        dtype = torch.float32  # bfloat16 needs AVX512-BF16 or AMX
    parts.qkv.to(dtype)
    tokens = size[0] * size[1]
    x = torch.randn(images, *size, heads * head_dim + rest).to(dtype)
    table = torch.randn(heads, tokens, tokens) if has_table else None
    parts.check(x, table)


def test_a_map_of_many_tiles() -> None:
    _Heads(1, 40, 16, (), True).check(torch.randn(2, 48, 13, 19).permute(0, 2, 3, 1))


def test_large_logits() -> None:
    parts = _Heads(1, 16, 8, (), False)
    x, table = 30 * torch.randn(1, 7, 7, 16), 300 * torch.randn(1, 49, 49)
    out = PackedCascadedAttention(list(parts.qkv), 8, [], None)(x, table)
    # Logits of some hundreds, in single precision.
    torch.testing.assert_close(out, parts.exact(x, table).float(), rtol=1e-4, atol=1e-2)
