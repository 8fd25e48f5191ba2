"""Inference forms of attention layers: cached tables, fewer passes, one map for all branches."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.attention.bilevel import BiLevelRoutingAttention, nearest_regions
from ops.attention.cascaded import CascadedGroupAttention
from ops.attention.factorized import FactorizedAttention, tap_positions
from ops.attention.hilo import HiLoAttention
from ops.attention.rank_augmented import RankAugmentedAttention, rotary_table
from ops.attention.single_head import SingleHeadAttention
from ops.attention.window import window_merge, window_partition
from ops.cpu import policy
from ops.cpu.attention.cascaded import PackedCascadedAttention, cascaded_attention
from ops.cpu.attention.gated import gated_attention, heads_unavailable, rank_augmented_attention
from ops.cpu.attention.grouped import attend, grouped_attention, split_heads
from ops.cpu.call.binding import unseen
from ops.cpu.pooling.window_means import window_means
from ops.inference.layers import FastForm, FastLayer, stands_for

__all__ = [
    "FastBiLevelRoutingAttention",
    "FastCascadedGroupAttention",
    "FastFactorizedAttention",
    "FastHiLoAttention",
    "FastRankAugmentedAttention",
    "FastSingleHeadAttention",
    "axis_rotations",
]

# Bytes of queries, keys, values and gates; larger batches are processed a few images at a time, so
# that maps stay in cache and below the size that malloc returns to the system when freed.
_PROJECTED_BYTES = 8 << 20


@stands_for(BiLevelRoutingAttention)
class FastBiLevelRoutingAttention(FastLayer, BiLevelRoutingAttention):
    """Attends to regions in place, see :func:`ops.attention.bilevel.bilevel_routing_attention`."""

    kernels: ClassVar = (grouped_attention, window_means)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, region_size: tuple[int, int]
    ) -> Tensor:
        height, width, dim = query.shape[1:]
        regions = height * width // (region_size[0] * region_size[1])
        whole = height % region_size[0] == width % region_size[1] == 0
        if not whole or self.topk >= regions or self.derived(query) is None:
            return super().attend(query, key, value, region_size)
        # Half precision would produce ties.
        wide = torch.promote_types(query.dtype, torch.float32)
        query_mean, key_mean = (
            window_means(t, region_size).flatten(1, 2).to(wide) for t in (query, key)
        )
        routes = nearest_regions(query_mean, key_mean, self.topk)
        q, k, v = (t.flatten(1, 2).unflatten(2, (self.num_heads, -1)) for t in (query, key, value))
        tokens = _region_rows(height, width, region_size)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        (of_heads,) = split_heads(out, 1, self.num_heads)
        grouped_attention(q, k, v, of_heads, tokens, routes=routes, scale=dim**-0.5)
        return out


@functools.lru_cache(maxsize=32)
@unseen()
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

    kernels: ClassVar = (grouped_attention, window_means)

    def fast(self, x: Tensor, derived: list[Tensor]) -> Tensor:
        enter, enter_bias, leave, leave_bias = derived
        height, width = x.shape[1:3]
        bottom, right = -height % self.window_size, -width % self.window_size
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        mixed = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._attend(x, F.linear(x, enter, enter_bias), mixed)
        if bottom or right:
            mixed = mixed[:, :height, :width].contiguous()
        return F.linear(mixed, leave, leave_bias)

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
            grouped_attention(query, key, value, out, rows)
        if low is not None:
            (out,) = split_heads(low_out, 1, low.num_heads)
            if low.window_size == 1:
                query, key, value = split_heads(of_low, 3, low.num_heads)
            else:
                coarse = window_means(x, (low.window_size, low.window_size))
                (query,) = split_heads(of_low, 1, low.num_heads)
                key, value = split_heads(low.kv(coarse), 2, low.num_heads)
            attend(query, key, value, out)

    def derive(self, x: Tensor) -> list[Tensor]:
        """Weight and bias of each projection."""
        inputs = [] if self.high is None else [self.high.qkv]
        if self.low is not None:
            inputs += [self.low.q] if self.low.window_size > 1 else [self.low.q, self.low.kv]
        outputs = [branch.proj for branch in (self.high, self.low) if branch is not None]
        joined = torch.cat([i.weight for i in inputs]), torch.cat([i.bias for i in inputs])
        apart = torch.block_diag(*(o.weight for o in outputs)), torch.cat([o.bias for o in outputs])
        return [t.detach() for t in (*joined, *apart)]


@functools.lru_cache(maxsize=32)
@unseen()
def axis_rotations(size: int, head_dim: int, axis: int) -> Tensor:
    """(size, head_dim): cosines, then sines, negated for even channels, of rows or columns."""
    shape = (size, 1) if axis == 0 else (1, size)
    cpu = torch.device("cpu")  # whatever the default device is
    sin, cos = (t.chunk(2, dim=1)[axis] for t in rotary_table(*shape, head_dim, device=cpu))
    signs = sin.new_tensor([-1.0, 1.0]).repeat(head_dim // 4)
    return torch.cat((cos, sin * signs), dim=1)


@stands_for(RankAugmentedAttention)
class FastRankAugmentedAttention(FastForm, RankAugmentedAttention):
    """Rotates, attends and gates in one pass, where that pays off."""

    def derive(self, x: Tensor) -> Any:
        """The kernel, if there is one for such heads."""
        kernel = rank_augmented_attention if self.linear else gated_attention
        if heads_unavailable(x.shape[3] // self.num_heads):
            return None
        return None if kernel.unavailable(x.device, x.dtype) else kernel

    def fast(self, x: Tensor, derived: Any) -> Tensor:
        tokens = x.shape[1] * x.shape[2]
        if not self.linear and not policy.rotated_attention_by_kernel(tokens, x.dtype):
            return RankAugmentedAttention.forward(self, x)
        projected_bytes = 4 * x.numel() * x.element_size()
        images = max(1, len(x) * _PROJECTED_BYTES // max(1, projected_bytes))
        if images >= len(x):
            return self._attend(x, derived)
        return torch.cat([self._attend(part, derived) for part in x.split(images)])

    def _attend(self, x: Tensor, kernel: Any) -> Tensor:
        qkvo = self.qkvo(x)
        value = qkvo.chunk(4, dim=-1)[2]
        bias = self.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        head_dim = x.shape[3] // self.num_heads
        tables = (axis_rotations(size, head_dim, axis) for axis, size in enumerate(x.shape[1:3]))
        return self.proj(kernel(qkvo, bias, *tables, self.num_heads))


@stands_for(FactorizedAttention)
class FastFactorizedAttention(FastForm, FactorizedAttention):
    """Every branch writes its channels of a shared map."""

    kernels: ClassVar = (grouped_attention,)

    def fast(self, x: Tensor, derived: tuple[()]) -> Tensor:
        if min(x.shape[1:3]) < self.global_branch.sr_ratio or x.shape[0] == 0:
            return FactorizedAttention.forward(self, x)
        splits = (self.global_dim, self.local_dim)
        queries = self.q(x).flatten(1, 2)
        mixed = torch.empty_like(queries)
        global_map, local_map = x.split(splits, dim=3)
        local_map = self.kv_pw(self.kv_dw(local_map.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        global_query, local_query = queries.split(splits, dim=2)
        global_out, local_out = mixed.split(splits, dim=2)
        key, value = _global_keys_and_values(self.global_branch, global_map)
        attend(global_query.unsqueeze(2), key, value, global_out.unsqueeze(2))
        heads, width = self.num_heads, self.group_dim // self.num_heads
        for branch, query, part, out in zip(
            self.local_branches,
            local_query.unflatten(2, (heads, -1)).split(width, dim=3),
            local_map.split(self.group_dim, dim=3),
            local_out.split(self.group_dim, dim=2),
            strict=True,
        ):
            key, value = _local_keys_and_values(branch, part)
            attend(query, key, value, out.unflatten(2, (heads, -1)))
        return self.proj(mixed.view(x.shape))


def _global_keys_and_values(branch: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, dim), no side below ``sr_ratio`` → (B, h·w, 1, dim) each.

    Patches do not overlap, so a linear layer reads them where they are.
    """
    side = branch.sr_ratio
    height, width = x.shape[1] // side, x.shape[2] // side
    whole = x[:, : height * side, : width * side]
    patches = whole.unflatten(2, (width, side)).unflatten(1, (height, side))
    weight = branch.sr.weight.permute(0, 2, 3, 1).flatten(1)
    reduced = F.linear(patches.transpose(2, 3).flatten(3), weight, branch.sr.bias)
    key, value = branch.kv(branch.norm(reduced)).chunk(2, dim=-1)
    value = branch.local_conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return key.flatten(1, 2).unsqueeze(2), value.flatten(1, 2).unsqueeze(2)


def _local_keys_and_values(branch: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, dim) → (B, window_size², heads, head_dim) each.

    For few windows, the linear layer includes the average.
    """
    batch, height, width, dim = x.shape
    heads, side = branch.num_heads, branch.window_size
    taps = x.flatten(1, 2).index_select(1, _taps(height, width, side, branch.dilation))
    taps = taps.view(batch, side**2, -1, heads, dim // heads)
    # See ops.attention.factorized.cross_window_fusion.
    sequence = taps.transpose(2, 3).flatten(3)  # (B, side², heads, windows · head_dim)
    windows = sequence.shape[3] // branch.kv.in_features
    averages = windows > 1 and isinstance(branch.fc, nn.Identity)
    if averages and policy.averages_in_linear(sequence.shape[3]):
        weight = branch.kv.weight.repeat_interleave(windows, dim=1) / windows
        both = F.linear(sequence, weight, branch.kv.bias)
    else:
        means = sequence if windows == 1 else sequence.unflatten(3, (-1, windows)).mean(-1)
        both = branch.kv(branch.fc(means))
    key, value = both.chunk(2, dim=-1)
    value_map = value.reshape(batch, side, side, dim).permute(0, 3, 1, 2)
    return key, branch.local_conv(value_map).permute(0, 2, 3, 1).reshape(value.shape)


@functools.lru_cache(maxsize=64)
@unseen()
def _taps(height: int, width: int, window_size: int, dilation: int) -> Tensor:
    """The pixel of each tap of each window, taps first: (window_size² · windows,)."""
    cpu = torch.device("cpu")
    rows = tap_positions(height, window_size, dilation, cpu)
    columns = tap_positions(width, window_size, dilation, cpu)
    # (k, k, n_y, n_x)
    pixels = rows.t()[:, None, :, None] * width + columns.t()[None, :, None, :]
    return pixels.flatten()


@stands_for(CascadedGroupAttention)
class FastCascadedGroupAttention(FastForm, CascadedGroupAttention):
    """All heads in one pass over NHWC."""

    kernels: ClassVar = (cascaded_attention,)

    def derive(self, x: Tensor) -> PackedCascadedAttention:
        heads: Any = self.heads
        projections, convs = ([getattr(h, n) for h in heads] for n in ("qkv", "dwconv"))
        return PackedCascadedAttention(projections, heads[0].splits[0], convs)

    def fast(self, x: Tensor, derived: PackedCascadedAttention) -> Tensor:
        height, width = x.shape[2:]
        size = self.window_size
        tokens = x.permute(0, 2, 3, 1)
        if height <= size and width <= size:
            return self.proj(self._mix(tokens, derived).permute(0, 3, 1, 2))
        bottom, right = -height % size, -width % size
        if bottom or right:
            tokens = F.pad(tokens, (0, 0, 0, right, 0, bottom))
        windows = window_partition(tokens, size)
        mixed = self._mix(windows.flatten(0, 2).unflatten(1, (size, size)), derived)
        mixed = window_merge(mixed.view(windows.shape), size)
        return self.proj(mixed[:, :height, :width].permute(0, 3, 1, 2))

    def _mix(self, x: Tensor, packed: PackedCascadedAttention) -> Tensor:
        """Everything except the projection: (N, h, w, dim) → (N, h, w, dim)."""
        return packed(x, self.bias(*x.shape[1:3]).float())


@stands_for(SingleHeadAttention)
class FastSingleHeadAttention(FastForm, SingleHeadAttention):
    """Small maps in one pass over NHWC."""

    kernels: ClassVar = (cascaded_attention,)

    def derive(self, x: Tensor) -> PackedCascadedAttention:
        qkv: Any = self.qkv
        return PackedCascadedAttention([qkv], self.qkv_splits[0], norm=self.norm)

    def fast(self, x: Tensor, derived: PackedCascadedAttention) -> Tensor:
        if not policy.single_head_by_kernel(x.shape[2] * x.shape[3]):
            return SingleHeadAttention.forward(self, x)
        return self.proj(derived(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
