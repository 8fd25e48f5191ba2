"""Inference forms of window attention, which reads and writes windows of the map in place."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from ops.attention.window import (
    MASK_VALUE,
    OverlappingWindowAttention,
    WindowAttention,
    overlap_position_index,
    overlapping_windows,
    relative_position_index,
    shift_masks,
    window_partition,
)
from ops.cpu import policy
from ops.cpu.attention.grouped import LINE, grouped_attention, split_heads
from ops.cpu.call.binding import unseen
from ops.inference.layers import FastForm, stands_for

__all__ = ["FastOverlappingWindowAttention", "FastWindowAttention"]


_CPU = torch.device("cpu")  # of what is kept, whatever the default device is


class _InPlaceAttention(FastForm):
    """Without rolling, partitioning or merging: (B, H, W, dim) → (B, H, W, dim)."""

    kernels: ClassVar = (grouped_attention,)
    window_size: int
    overlap_size: int = 0  # of the keys' window; 0: they have the queries' window
    shift_size: int = 0
    num_heads: int
    relative_position_bias_table: Any
    qkv: Any
    proj: Any

    @property
    def _geometry(self) -> tuple[int, int, int]:
        return self.window_size, self.overlap_size, self.shift_size

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        query, key, value = split_heads(self.qkv(x), 3, self.num_heads)
        rows, key_rows, kinds = _windows(x.shape[1], x.shape[2], *self._geometry)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        terms = derived, _lines(*self._geometry)[1], kinds
        (heads,) = split_heads(out, 1, self.num_heads)
        grouped_attention(query, key, value, heads, rows, key_rows, None, *terms)
        projected: Tensor = self.proj(out)
        return projected

    def derive(self, x: Tensor) -> Tensor | None:
        """(heads, lines, LINE): the terms added to the scores before scaling."""
        if not policy.window_attention_by_kernel(self.overlap_size or self.window_size, x.dtype):
            return None
        entries, _ = _lines(*self._geometry)
        bias = self.relative_position_bias_table.float().t()
        either = torch.stack((bias, bias + MASK_VALUE), dim=2).flatten(1)
        return (self.qkv.in_features // self.num_heads) ** 0.5 * either[:, entries]


@stands_for(WindowAttention)
class FastWindowAttention(_InPlaceAttention, WindowAttention):
    """Attention in windows of a map that may be shifted."""


@stands_for(OverlappingWindowAttention)
class FastOverlappingWindowAttention(_InPlaceAttention, OverlappingWindowAttention):
    """Attention to larger windows."""


@functools.lru_cache(maxsize=16)
@unseen()
def _windows(
    height: int, width: int, window_size: int, overlap_size: int, shift_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens and keys of each window, and its kind: 0, or one plus the index of its shift mask.

    Returns:
        int32 (windows, window_size²); the same of keys, -1 outside the map; and (windows,) or,
        without a shift, None.
    """
    tokens = torch.arange(height * width, dtype=torch.int32, device=_CPU).view(1, height, width, 1)
    windows = window_partition(tokens.roll((-shift_size, -shift_size), (1, 2)), window_size)[0]
    rows = windows.flatten(0, 1).flatten(1).contiguous()
    if overlap_size:
        grown = overlapping_windows(1 + tokens, window_size, overlap_size)
        return rows, (grown.flatten(0, 2).flatten(1) - 1).contiguous(), None
    kinds = torch.zeros(windows.shape[:2], dtype=torch.int32, device=_CPU)
    kinds[:, -1] += 1
    kinds[-1] += 2
    return rows, rows, kinds.flatten() if shift_size else None


@functools.lru_cache(maxsize=16)
@unseen()
def _lines(window_size: int, overlap_size: int, shift_size: int) -> tuple[Tensor, Tensor]:
    """The distinct lines of terms, see :func:`ops.cpu.attention.grouped.grouped_attention`.

    Their kinds are no mask and, with a shift, its masks.

    Returns:
        int64 (number of lines, LINE), twice the index into the table of biases, plus one if masked;
        int32 (kinds, ⌈N / LINE⌉, M), indices of lines.
    """
    if overlap_size:
        index = overlap_position_index(window_size, overlap_size, _CPU)
    else:
        index = relative_position_index(window_size, _CPU)
    masked = torch.zeros(1, *index.shape, device=_CPU)
    if shift_size:
        masked = torch.cat((masked, shift_masks(window_size, shift_size, device=_CPU)))
    entries = 2 * index + (masked != 0)
    rest = -entries.shape[1] % LINE
    entries = torch.cat((entries, entries[:, -1:].expand(-1, rest, -1)), dim=1)
    blocks = entries.unflatten(1, (-1, LINE)).transpose(2, 3)  # (kinds, blocks, M, LINE)
    lines, which = blocks.flatten(0, 2).unique(dim=0, return_inverse=True)
    return lines, which.view(blocks.shape[:3]).int()
