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
from ops.cpu.attention import grouped as grouped_attention
from ops.cpu.attention.grouped import LINE, ScoreTerms, split_heads
from ops.inference.layers import FastForm, stands_for

__all__ = ["FastOverlappingWindowAttention", "FastWindowAttention"]


_CPU = torch.device("cpu")  # of what is kept, whatever the default device is


class _InPlaceAttention(FastForm):
    """Without rolling, partitioning or merging."""

    kernels: ClassVar = (grouped_attention.grouped_attention,)
    window_size: int
    num_heads: int
    relative_position_bias_table: Any
    qkv: Any
    proj: Any

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        query, key, value = split_heads(self.qkv(x), 3, self.num_heads)
        rows, key_rows, kinds = self._tokens(x.shape[1], x.shape[2])
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        terms = ScoreTerms(derived, self._lines()[1], kinds)
        (heads,) = split_heads(out, 1, self.num_heads)
        grouped_attention.attend_windows(query, key, value, rows, key_rows, terms, heads)
        projected: Tensor = self.proj(out)
        return projected

    def _tokens(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The query tokens, key tokens and kind of each window."""
        raise NotImplementedError

    def _lines(self) -> tuple[Tensor, Tensor]:
        """See :func:`_distinct_lines`."""
        raise NotImplementedError

    def derive(self, x: Tensor) -> Tensor | None:
        """(heads, lines, LINE): the terms added to the scores before scaling."""
        side = getattr(self, "overlap_size", self.window_size)  # of the keys' window
        if not policy.window_attention_by_kernel(side, x.dtype):
            return None
        entries, _ = self._lines()
        bias = self.relative_position_bias_table.float().t()
        either = torch.stack((bias, bias + MASK_VALUE), dim=2).flatten(1)
        return (self.qkv.in_features // self.num_heads) ** 0.5 * either[:, entries]


@stands_for(WindowAttention)
class FastWindowAttention(_InPlaceAttention, WindowAttention):
    """(B, H, W, dim) → (B, H, W, dim)."""

    def _tokens(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, kinds = _windows(height, width, self.window_size, self.shift_size)
        return rows, rows, kinds

    def _lines(self) -> tuple[Tensor, Tensor]:
        return _lines(self.window_size, self.shift_size)


@stands_for(OverlappingWindowAttention)
class FastOverlappingWindowAttention(_InPlaceAttention, OverlappingWindowAttention):
    """(B, H, W, dim) → (B, H, W, dim)."""

    def _tokens(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, _ = _windows(height, width, self.window_size, 0)
        return rows, _grown_windows(height, width, self.window_size, self.overlap_size), None

    def _lines(self) -> tuple[Tensor, Tensor]:
        return _grown_lines(self.window_size, self.overlap_size)


@functools.lru_cache(maxsize=8)
def _windows(
    height: int, width: int, window_size: int, shift_size: int
) -> tuple[Tensor, Tensor | None]:
    """The tokens of each window, and its kind: 0, or one plus the index of its shift mask.

    Returns:
        int32 (windows, window_size²), and (windows,) or, without a shift, None.
    """
    tokens = torch.arange(height * width, dtype=torch.int32, device=_CPU).view(1, height, width, 1)
    shifted = tokens.roll((-shift_size, -shift_size), (1, 2))
    rows = window_partition(shifted, window_size)[0]
    kinds = torch.zeros(rows.shape[:2], dtype=torch.int32, device=_CPU)
    kinds[:, -1] += 1
    kinds[-1] += 2
    return rows.flatten(0, 1).flatten(1).contiguous(), kinds.flatten() if shift_size else None


@functools.lru_cache(maxsize=8)
def _grown_windows(height: int, width: int, window_size: int, overlap_size: int) -> Tensor:
    """The tokens of each enlarged window, -1 outside the map: int32 (windows, overlap_size²)."""
    tokens = 1 + torch.arange(height * width, device=_CPU).view(1, height, width, 1)
    windows = overlapping_windows(tokens, window_size, overlap_size)
    return (windows.flatten(0, 2).flatten(1) - 1).int().contiguous()


@functools.lru_cache(maxsize=8)
def _lines(window_size: int, shift_size: int) -> tuple[Tensor, Tensor]:
    """See :func:`_distinct_lines`; the kinds are no mask and a shift's masks."""
    index = relative_position_index(window_size, _CPU)
    masked = torch.zeros(1, *index.shape, device=_CPU)
    if shift_size:
        masked = torch.cat((masked, shift_masks(window_size, shift_size, device=_CPU)))
    return _distinct_lines(index, masked != 0)


@functools.lru_cache(maxsize=8)
def _grown_lines(window_size: int, overlap_size: int) -> tuple[Tensor, Tensor]:
    """See :func:`_distinct_lines`; there is one kind."""
    index = overlap_position_index(window_size, overlap_size, _CPU)
    return _distinct_lines(index, torch.zeros(1, *index.shape, dtype=torch.bool, device=_CPU))


def _distinct_lines(index: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct lines of :class:`ops.cpu.attention.grouped.ScoreTerms`.

    Args:
        index: (N, M), the table index of the bias for query and key.
        masked: (kinds, N, M), whether a pair is masked.

    Returns:
        int64 (number of lines, LINE), twice the table index, plus one if masked; int32 (kinds,
        ⌈N / LINE⌉, M), indices of lines.
    """
    entries = 2 * index + masked
    rest = -entries.shape[1] % LINE
    entries = torch.cat((entries, entries[:, -1:].expand(-1, rest, -1)), dim=1)
    blocks = entries.unflatten(1, (-1, LINE)).transpose(2, 3)  # (kinds, blocks, M, LINE)
    lines, which = blocks.flatten(0, 2).unique(dim=0, return_inverse=True)
    return lines, which.view(blocks.shape[:3]).int()
