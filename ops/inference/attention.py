"""Inference forms of attention layers: cached tables, fewer passes, fused shortcuts."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.attention.bilevel import (
    BiLevelRoutingAttention,
    bilevel_routing_attention,
    nearest_regions,
)
from ops.attention.hilo import HiLoAttention
from ops.attention.rank_augmented import RankAugmentedAttention, Rotary, rotary_table
from ops.cpu import policy
from ops.cpu.attention import grouped as grouped_attention
from ops.cpu.attention.gated import gated_attention, heads_unavailable, rank_augmented_attention
from ops.cpu.attention.grouped import split_heads
from ops.cpu.pooling.window_means import window_means
from ops.inference.layers import FastForm, fast_path_applies, stands_for
from ops.inference.packed_linear import PackedLinear

__all__ = [
    "FastBiLevelRoutingAttention",
    "FastHiLoAttention",
    "FastRankAugmentedAttention",
    "axis_rotations",
]

# Bytes of queries, keys, values and gates; larger batches are processed a few images at a time, so
# that maps stay in cache and below the size that malloc returns to the system when freed.
_PROJECTED_BYTES = 8 << 20


@stands_for(BiLevelRoutingAttention)
class FastBiLevelRoutingAttention(BiLevelRoutingAttention):
    """Attends to regions in place."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        bottom, right = -height % self.n_win, -width % self.n_win
        if self.pad_input and (bottom or right):
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        region_size = (max(1, x.shape[1] // self.n_win), max(1, x.shape[2] // self.n_win))
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        out = self._attend(query, key, value, region_size)
        out = self.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + out
        return self.proj(out[:, :height, :width])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, region_size: tuple[int, int]
    ) -> Tensor:
        """See :func:`ops.attention.bilevel.bilevel_routing_attention`."""
        height, width, dim = query.shape[1:]
        whole = height % region_size[0] == width % region_size[1] == 0
        regions = height * width // (region_size[0] * region_size[1])
        fast = whole and self.topk < regions and fast_path_applies(query, self.qkv.weight)
        kernels = grouped_attention.grouped_attention, window_means
        if not fast or any(k.unavailable(query.device, query.dtype) for k in kernels):
            return bilevel_routing_attention(
                query, key, value, self.num_heads, region_size, self.topk
            )
        # Half precision would produce ties.
        wide = torch.promote_types(query.dtype, torch.float32)
        query_mean, key_mean = (
            window_means(t, region_size).flatten(1, 2).to(wide) for t in (query, key)
        )
        routes = nearest_regions(query_mean, key_mean, self.topk)
        q, k, v = (t.flatten(1, 2).unflatten(2, (self.num_heads, -1)) for t in (query, key, value))
        rows = _region_rows(height, width, region_size)
        out = grouped_attention.attend_regions(q, k, v, rows, routes, dim**-0.5)
        return out.view(value.shape)


@functools.lru_cache(maxsize=32)
def _region_rows(height: int, width: int, region_size: tuple[int, int]) -> Tensor:
    """The tokens of each region of an evenly divided map: (regions, tokens of a region)."""
    cpu = torch.device("cpu")  # whatever the default device is
    tokens = torch.arange(height * width, dtype=torch.int32, device=cpu).view(
        height // region_size[0], region_size[0], width // region_size[1], region_size[1]
    )
    return tokens.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


@stands_for(HiLoAttention)
class FastHiLoAttention(FastForm, HiLoAttention):
    """One joint input projection, and one output projection for all heads with the shortcut."""

    kernels: ClassVar = (grouped_attention.grouped_attention, window_means)

    def fast(self, x: Tensor, derived: tuple[PackedLinear, PackedLinear]) -> Tensor:
        enter, leave = derived
        height, width = x.shape[1:3]
        bottom, right = -height % self.window_size, -width % self.window_size
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        mixed = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._attend(x, enter(x), mixed)
        if bottom or right:
            mixed = mixed[:, :height, :width].contiguous()
        return leave(mixed)

    def _attend(self, x: Tensor, projected: Tensor, mixed: Tensor) -> None:
        """``projected`` is (B, H, W, …); ``mixed`` (B, H, W, dim) receives the heads' outputs."""
        high, low = self.high, self.low
        high_dim = 0 if high is None else high.proj.in_features
        of_high, of_low = projected.tensor_split([3 * high_dim], dim=-1)
        high_out, low_out = mixed.tensor_split([high_dim], dim=-1)
        if high is not None:
            query, key, value = split_heads(of_high, 3, high.num_heads)
            rows = _region_rows(*x.shape[1:3], (high.window_size, high.window_size))
            (out,) = split_heads(high_out, 1, high.num_heads)
            grouped_attention.attend_regions(query, key, value, rows, out=out)
        if low is not None:
            (out,) = split_heads(low_out, 1, low.num_heads)
            if low.window_size == 1:
                query, key, value = split_heads(of_low, 3, low.num_heads)
            else:
                coarse = window_means(x, (low.window_size, low.window_size))
                (query,) = split_heads(of_low, 1, low.num_heads)
                key, value = split_heads(low.kv(coarse), 2, low.num_heads)
            grouped_attention.attend(query, key, value, out)

    def derive(self, x: Tensor) -> tuple[PackedLinear, PackedLinear]:
        inputs = [] if self.high is None else [self.high.qkv]
        if self.low is not None:
            inputs += [self.low.q] if self.low.window_size > 1 else [self.low.q, self.low.kv]
        outputs = [branch.proj for branch in (self.high, self.low) if branch is not None]
        weights, biases = ([getattr(i, n) for i in inputs] for n in ("weight", "bias"))
        return (
            PackedLinear(torch.cat(weights), torch.cat(biases)),
            PackedLinear(
                torch.block_diag(*(o.weight for o in outputs)),
                torch.cat([o.bias for o in outputs]),
            ),
        )


@functools.lru_cache(maxsize=32)
def axis_rotations(size: int, head_dim: int, axis: int) -> Tensor:
    """(size, head_dim): cosines, then sines, negated for even channels, of rows or columns."""
    shape = (size, 1) if axis == 0 else (1, size)
    cpu = torch.device("cpu")  # whatever the default device is
    sin, cos = (t.chunk(2, dim=1)[axis] for t in rotary_table(*shape, head_dim, device=cpu))
    signs = sin.new_tensor([-1.0, 1.0]).repeat(head_dim // 4)
    return torch.cat((cos, sin * signs), dim=1)


@stands_for(RankAugmentedAttention)
class FastRankAugmentedAttention(RankAugmentedAttention):
    """Rotates, attends and gates in one pass, where that pays off."""

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        if not fast_path_applies(x, self.qkvo.weight) or not self._by_kernel(x):
            return super().forward(x, rotary)
        return self._attend_in_chunks(x)

    def _by_kernel(self, x: Tensor) -> bool:
        height, width, dim = x.shape[1:]
        kernel = rank_augmented_attention if self.linear else gated_attention
        if heads_unavailable(dim // self.num_heads) or kernel.unavailable(x.device, x.dtype):
            return False
        return self.linear or policy.rotated_attention_by_kernel(height * width, x.dtype)

    def _attend_in_chunks(self, x: Tensor) -> Tensor:
        projected_bytes = 4 * x.numel() * x.element_size()
        images = max(1, len(x) * _PROJECTED_BYTES // max(1, projected_bytes))
        if images >= len(x):
            return self._attend(x)
        return torch.cat([self._attend(part) for part in x.split(images)])

    def _attend(self, x: Tensor) -> Tensor:
        qkvo = self.qkvo(x)
        value = qkvo.chunk(4, dim=-1)[2]
        bias = self.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        attend = rank_augmented_attention if self.linear else gated_attention
        head_dim = x.shape[3] // self.num_heads
        tables = (axis_rotations(size, head_dim, axis) for axis, size in enumerate(x.shape[1:3]))
        return self.proj(attend(qkvo, bias, *tables, self.num_heads))
