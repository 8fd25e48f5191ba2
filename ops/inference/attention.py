"""Inference forms of attention layers: cached tables, fewer passes, shortcuts added on the way."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.attention.bilevel import (
    BiLevelRoutingAttention,
    bilevel_routing_attention,
    route_regions,
)
from ops.attention.hilo import HighFrequencyAttention, LowFrequencyAttention
from ops.attention.large_kernel import LargeKernelAttention
from ops.attention.rank_augmented import RankAugmentedAttention, Rotary, rotary_table
from ops.inference import grouped_attention
from ops.inference.layers import runs_fast
from ops.inference.linear_attention import gated_linear_attention, unsupported

__all__ = [
    "FastBiLevelRoutingAttention",
    "FastHighFrequencyAttention",
    "FastLargeKernelAttention",
    "FastLowFrequencyAttention",
    "FastRankAugmentedAttention",
]


class FastLargeKernelAttention(LargeKernelAttention):
    """The gate is overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.pw(self.dw_dilated(self.dw(x)))
        return x * gate if gate.requires_grad else gate.mul_(x)


class FastBiLevelRoutingAttention(BiLevelRoutingAttention):
    """Regions are attended to where they lie; the projection adds the shortcut."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        height, width = x.shape[1:3]
        bottom, right = -height % self.n_win, -width % self.n_win
        if self.pad_input and (bottom or right):
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        region_size = (max(1, x.shape[1] // self.n_win), max(1, x.shape[2] // self.n_win))
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        out = self._attend(query, key, value, region_size)
        out = self.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + out
        return self.proj(out[:, :height, :width], residual)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, region_size: tuple[int, int]
    ) -> Tensor:
        """See :func:`ops.attention.bilevel.bilevel_routing_attention`."""
        height, width, dim = query.shape[1:]
        whole = height % region_size[0] == width % region_size[1] == 0
        regions = height * width // (region_size[0] * region_size[1])
        fast = whole and self.topk < regions and runs_fast(query, self.qkv.weight)
        if not fast or grouped_attention.unsupported(query.device, query.dtype) is not None:
            return bilevel_routing_attention(
                query, key, value, self.num_heads, region_size, self.topk
            )
        routes = route_regions(query, key, region_size, self.topk)
        q, k, v = (t.flatten(1, 2).unflatten(2, (self.num_heads, -1)) for t in (query, key, value))
        rows = _region_rows(height, width, region_size)
        out = grouped_attention.attend_regions(q, k, v, rows, routes, dim**-0.5)
        return out.view(value.shape)


@functools.lru_cache(maxsize=32)
def _region_rows(height: int, width: int, region_size: tuple[int, int]) -> Tensor:
    """The tokens of each region of a map that they divide: (regions, tokens of a region)."""
    tokens = torch.arange(height * width, dtype=torch.int32).view(
        height // region_size[0], region_size[0], width // region_size[1], region_size[1]
    )
    return tokens.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


class FastLowFrequencyAttention(LowFrequencyAttention):
    """See :func:`ops.inference.grouped_attention.attend`."""

    def forward(self, x: Tensor) -> Tensor:
        fast = runs_fast(x, self.q.weight)
        if not fast or grouped_attention.unsupported(x.device, x.dtype) is not None:
            return super().forward(x)
        coarse = x
        if self.window_size > 1:
            coarse = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        query = self.q(x)
        mixed = torch.empty_like(query)
        key_value = self.kv(coarse).flatten(1, 2).unflatten(2, (2, self.num_heads, -1))
        key, value = key_value.unbind(2)  # (B, h · w, heads, head_dim)
        q, out = (t.flatten(1, 2).unflatten(2, (self.num_heads, -1)) for t in (query, mixed))
        grouped_attention.attend(q, key, value, out)
        return self.proj(mixed)


class FastHighFrequencyAttention(HighFrequencyAttention):
    """Windows are regions that see themselves, where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        fast = runs_fast(x, self.qkv.weight)
        if not fast or grouped_attention.unsupported(x.device, x.dtype) is not None:
            return super().forward(x)
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(2)  # (B, HW, heads, head_dim)
        rows = _region_rows(height, width, (self.window_size, self.window_size))
        out = grouped_attention.attend_regions(query, key, value, rows)
        return self.proj(out.view(batch, height, width, -1))


@functools.lru_cache(maxsize=8)
def _turns(height: int, width: int, head_dim: int) -> Tensor:
    """The rotations as complex numbers: (height · width, head_dim / 2)."""
    sin, cos = rotary_table(height, width, head_dim)
    return torch.complex(cos[:, ::2].contiguous(), sin[:, ::2].contiguous())


class FastRankAugmentedAttention(RankAugmentedAttention):
    """Linear attention by our kernel; else rotations are products of complex numbers."""

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if not runs_fast(x, self.qkvo.weight) or x.dtype == torch.float64:
            out = super().forward(x, rotary)
            return out if residual is None else out + residual
        height, width, dim = x.shape[1:]
        head_dim = dim // self.num_heads
        qkvo = self.qkvo(x)
        *qkv, gate = qkvo.chunk(4, dim=-1)
        if self.linear and unsupported(x.device, x.dtype, head_dim) is None:
            bias = self.lepe(qkv[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.proj(gated_linear_attention(qkvo, bias, self.num_heads), residual)
        turns = _turns(height, width, head_dim)
        query, key, value = (
            t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in qkv
        )  # (B, heads, HW, head_dim)
        if self.linear:
            out = _linear_attention(query.float(), key.float(), value.float(), turns).to(x.dtype)
        else:
            query, key = (_rotate(t.float(), turns).to(x.dtype) for t in (query, key))
            out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).reshape(x.shape)
        out = self.lepe(qkv[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1).add_(out).mul_(gate)
        return self.proj(out, residual)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, turns: Tensor) -> Tensor:
    """As :func:`ops.attention.rank_augmented.rank_augmented_linear_attention`, in float32."""
    q, k = (F.elu(t).add_(1) for t in (query, key))
    logits = (q.shape[-1] ** -0.5 * q.mean(dim=2, keepdim=True)) @ k.transpose(2, 3)
    k.mul_(logits.softmax(dim=-1).transpose(2, 3))
    total = (q @ k.sum(dim=2).unsqueeze(-1)).add_(1e-6)  # (B, heads, N, 1)
    state = _rotate(k, turns).transpose(2, 3) @ value  # (B, heads, head_dim, head_dim)
    return (_rotate(q, turns) @ state).div_(total)
