"""Inference forms of the mobile networks' attention, channels-last."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ops.attention.cascaded import CascadedGroupAttention, distance_bias, resize_distance_table
from ops.attention.single_head import SingleHeadAttention
from ops.cpu import policy
from ops.cpu.attention.cascaded import PackedCascadedAttention, cascaded_attention
from ops.inference.layers import FastForm, stands_for

__all__ = ["FastCascadedGroupAttention", "FastSingleHeadAttention"]


class _Cascade(NamedTuple):
    """The heads' layers for the kernel, and tables of biases by a map's size."""

    packed: PackedCascadedAttention
    biases: dict[tuple[int, int], Tensor]


@stands_for(CascadedGroupAttention)
class FastCascadedGroupAttention(FastForm, CascadedGroupAttention):
    """All heads in one pass over NHWC, with bias tables cached by map size."""

    kernels: ClassVar = (cascaded_attention,)

    def derive(self, x: Tensor) -> _Cascade:
        heads: Any = self.heads
        projections, convs = ([getattr(h, n) for h in heads] for n in ("qkv", "dwconv"))
        return _Cascade(PackedCascadedAttention(projections, heads[0].splits[0], convs), {})

    def fast(self, x: Tensor, derived: _Cascade) -> Tensor:
        height, width = x.shape[2:]
        size = self.window_size
        tokens = x.permute(0, 2, 3, 1)
        if height <= size and width <= size:
            return self.proj(self._mix(tokens, derived).permute(0, 3, 1, 2))
        bottom, right = -height % size, -width % size
        if bottom or right:
            tokens = F.pad(tokens, (0, 0, 0, right, 0, bottom))
        batch, rows, columns, dim = tokens.shape
        split = tokens.view(batch, rows // size, size, columns // size, size, dim).transpose(2, 3)
        mixed = self._mix(split.reshape(-1, size, size, dim), derived)
        mixed = mixed.view(split.shape).transpose(2, 3).reshape(batch, rows, columns, dim)
        return self.proj(mixed[:, :height, :width].permute(0, 3, 1, 2))

    def _mix(self, x: Tensor, cascade: _Cascade) -> Tensor:
        """Everything except the projection: (N, h, w, dim) → (N, h, w, dim)."""
        size = x.shape[1], x.shape[2]
        if size not in cascade.biases:
            table = self.attention_biases.unflatten(1, (self.table_size, self.table_size))
            bias = distance_bias(resize_distance_table(table, *size)).float()
            cascade.biases[size] = bias
        return cascade.packed(x, cascade.biases[size])


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
