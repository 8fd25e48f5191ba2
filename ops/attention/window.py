"""Self-attention within windows, plain or shifted, and to overlapping windows.

Of Swin Transformer (https://arxiv.org/abs/2103.14030) and HAT (https://arxiv.org/abs/2205.04437).
The relative position bias is added to the scores of each window; shifted windows in the last row or
column also have a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.arguments import checked
from ops.attention.biased import attend_in_turn, worth_a_turn
from ops.init import trunc_normal

__all__ = [
    "MASK_VALUE",
    "OverlappingWindowAttention",
    "WindowAttention",
    "overlap_position_index",
    "overlapping_windows",
    "relative_position_index",
    "shift_masks",
    "window_attention",
    "window_merge",
    "window_partition",
]

MASK_VALUE = -100.0  # added to scores


@checked(ranks={"x": 4})
def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Divide a map into non-overlapping windows.

    Args:
        x: (B, H, W, C).
        window_size: side of a window.

    Returns:
        (B, H // window_size, W // window_size, window_size², C).

    Raises:
        ValueError: a side that is not a multiple of ``window_size``.
    """
    batch, height, width, dim = x.shape
    rows, columns = _grid(height, width, window_size)
    x = x.reshape(batch, rows, window_size, columns, window_size, dim).transpose(2, 3)
    return x.reshape(batch, rows, columns, window_size**2, dim)


@checked(ranks={"windows": 5})
def window_merge(windows: Tensor, window_size: int) -> Tensor:
    """Inverse of :func:`window_partition`: (B, rows, columns, window_size², C) → (B, H, W, C).

    Raises:
        ValueError: windows of another size.
    """
    batch, rows, columns, tokens, dim = windows.shape
    if tokens != window_size**2:
        raise ValueError(f"windows of {window_size}×{window_size} do not have {tokens} tokens")
    x = windows.reshape(batch, rows, columns, window_size, window_size, dim).transpose(2, 3)
    return x.reshape(batch, rows * window_size, columns * window_size, dim)


def _heads_of_windows(x: Tensor, window_size: int, parts: int, num_heads: int) -> Tensor:
    """Windows of a map with channels (``parts``, heads, head_dim).

    (B, H, W, parts · heads · head_dim) → (B, rows, columns, parts, heads, window_size², head_dim).
    """
    batch, height, width, dim = x.shape
    rows, columns = _grid(height, width, window_size)
    heads = (parts, num_heads, dim // (parts * num_heads))
    x = x.reshape(batch, rows, window_size, columns, window_size, *heads)
    return x.permute(0, 1, 3, 5, 6, 2, 4, 7).flatten(5, 6)


def _map_of_heads(windows: Tensor, window_size: int) -> Tensor:
    """(B, rows, columns, heads, window_size², head_dim) → (B, H, W, heads · head_dim)."""
    batch, rows, columns, heads, _, head_dim = windows.shape
    x = windows.unflatten(4, (window_size, window_size)).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, rows * window_size, columns * window_size, heads * head_dim)


def _grid(height: int, width: int, window_size: int) -> tuple[int, int]:
    """Rows and columns of windows in a map."""
    if height % window_size or width % window_size:
        raise ValueError(
            f"a map of {height}×{width} can't be divided into windows of {window_size}; pad it"
        )
    return height // window_size, width // window_size


@checked(ranks={"x": 4})
def overlapping_windows(x: Tensor, window_size: int, overlap_size: int) -> Tensor:
    """The windows of :func:`window_partition`, enlarged on all sides, with zero padding.

    Args:
        x: (B, H, W, C); sides are multiples of ``window_size``.
        overlap_size: side of the enlarged windows: ``window_size`` plus an even number.

    Returns:
        (B, H // window_size, W // window_size, overlap_size², C).

    Raises:
        ValueError: an invalid ``overlap_size``.
    """
    if overlap_size < window_size or (overlap_size - window_size) % 2:
        raise ValueError(
            f"overlap_size must be window_size {window_size} + an even number, got {overlap_size}"
        )
    margin = (overlap_size - window_size) // 2
    batch, height, width, dim = x.shape
    rows, columns = height // window_size, width // window_size
    # The gradient of a gather takes an eighth of the time of the gradient of two `unfold` calls.
    padded = F.pad(x, (0, 0, margin, margin, margin, margin)).flatten(1, 2)
    inside = torch.arange(overlap_size, device=x.device)
    row = window_size * torch.arange(rows, device=x.device).unsqueeze(1) + inside
    column = window_size * torch.arange(columns, device=x.device).unsqueeze(1) + inside
    places = row[:, None, :, None] * (width + 2 * margin) + column[:, None]
    windows = padded.index_select(1, places.flatten())
    return windows.view(batch, rows, columns, overlap_size**2, dim)


def _differences(size: int, other: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Row and column differences between the tokens of two windows."""
    own, others = torch.arange(size, device=device), torch.arange(other, device=device)
    difference = own[:, None] - others
    rows = difference[:, None, :, None].expand(size, size, other, other)
    columns = difference[None, :, None, :].expand(size, size, other, other)
    return rows.reshape(size**2, other**2), columns.reshape(size**2, other**2)


@checked()
def relative_position_index(window_size: int, device: torch.device | None = None) -> Tensor:
    """Index into a bias table of (2·window_size - 1)² rows for each pair of tokens.

    Returns:
        int64 (window_size², window_size²), for (query, key).
    """
    rows, columns = _differences(window_size, window_size, device)
    last = window_size - 1
    return (rows + last) * (2 * window_size - 1) + columns + last


@checked()
def overlap_position_index(
    window_size: int, overlap_size: int, device: torch.device | None = None
) -> Tensor:
    """The same for keys in a window of ``overlap_size`` and (window_size + overlap_size - 1)² rows.

    As in the published model, whose weights depend on it, negative indices of some pairs wrap
    around to the end of the table.

    Returns:
        int64 (window_size², overlap_size²).
    """
    rows, columns = _differences(window_size, overlap_size, device)
    first, side = window_size - overlap_size + 1, window_size + overlap_size - 1
    return ((first - rows) * side + first - columns).remainder(side**2)


@checked(least={"shift_size": 0})
def shift_masks(
    window_size: int,
    shift_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Masks for windows that contain both ends of the map after the cyclic shift.

    Returns:
        (3, window_size², window_size²), ``MASK_VALUE`` where query and key come from different
        ends of the map: for windows in the last column, in the last row, and in both.
    """
    wrapped = (torch.arange(window_size, device=device) + shift_size) // window_size  # 0 or 1
    row = wrapped[:, None].expand(window_size, window_size).flatten()
    column = wrapped.repeat(window_size)
    apart_rows, apart_columns = row[:, None] != row, column[:, None] != column
    apart = torch.stack((apart_columns, apart_rows, apart_rows | apart_columns))
    return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, MASK_VALUE)


@checked(ranks={"query": 6, "key": 6, "value": 6, "bias": 3, "masks": 3})
def window_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, masks: Tensor | None = None
) -> Tensor:
    """Attention of each window to its own keys.

    Args:
        query: (B, rows, columns, N, heads, head_dim).
        key, value: (B, rows, columns, M, heads, head_dim).
        bias: (heads, N, M), added to the scores of every window.
        masks: (3, N, M), added to the scores in the last column, row and window,
            see :func:`shift_masks`; requires M = N.

    Returns:
        (B, rows, columns, N, heads · head_dim).
    """
    windows = query.shape[:3]
    if masks is None:
        q, k, v = (t.flatten(0, 2).transpose(1, 2) for t in (query, key, value))
        out = _attend(q, k, v, bias).unflatten(0, windows)
    else:
        qkv = torch.stack((query, key, value), dim=3).transpose(4, 5)
        out = _attend_shifted(qkv, bias, masks)
    return out.transpose(3, 4).flatten(4)


def _attend_shifted(qkv: Tensor, bias: Tensor, masks: Tensor) -> Tensor:
    """Attention with masks for the last column, row and window.

    (B, rows, columns, 3, heads, N, head_dim) → (B, rows, columns, heads, N, head_dim).
    """
    batch, rows, columns = qkv.shape[:3]
    if not batch:
        return qkv[:, :, :, 0]
    q, k, v = qkv.flatten(0, 2).unbind(1)
    if worth_a_turn(q, k, v, bias):
        out = attend_in_turn(q, k, v, bias, _masks_of_windows(batch, rows, columns, masks))
        return out.unflatten(0, (batch, rows, columns))
    bands = []
    for band, in_column, in_corner in zip(
        _split_last(qkv, 1), (None, masks[1]), (masks[0], masks[2]), strict=True
    ):
        parts = []
        for part, mask in zip(_split_last(band, 2), (in_column, in_corner), strict=True):
            if part.numel():
                q, k, v = part.contiguous().flatten(0, 2).unbind(1)
                out = _attend(q, k, v, bias if mask is None else bias + mask)
                parts.append(out.unflatten(0, part.shape[:3]))
        if parts:
            bands.append(torch.cat(parts, dim=2))
    return torch.cat(bands, dim=1)


def _split_last(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """All entries along ``dim`` except the last (possibly none), and the last."""
    rest = x.shape[dim] - 1
    return x.narrow(dim, 0, rest), x.narrow(dim, rest, 1)


def _masks_of_windows(batch: int, rows: int, columns: int, masks: Tensor) -> list[Tensor | None]:
    """The mask of :func:`shift_masks`, or None, for each window."""
    of_column, of_row, of_corner = masks
    inner: list[Tensor | None] = [*[None] * (columns - 1), of_column]
    last: list[Tensor | None] = [*[of_row] * (columns - 1), of_corner]
    return (inner * (rows - 1) + last) * batch


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of windows with the same bias.

    Args:
        q: (windows, heads, N, head_dim).
        k, v: (windows, heads, M, head_dim).
        bias: (heads, N, M).

    Returns:
        (windows, heads, N, head_dim).
    """
    if worth_a_turn(q, k, v, bias):
        return attend_in_turn(q, k, v, bias, [None] * len(q))
    scale = q.shape[-1] ** -0.5
    if q.is_cpu and bias.requires_grad and torch.is_grad_enabled():
        # torch's fused CPU kernels don't compute the bias gradient, and its unfused implementation
        # guards the softmax against rows of -inf, which takes a tenth of a training step.
        scores = (scale * q) @ k.transpose(2, 3)
        return (scores + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0), scale=scale)


class _BiasedAttention(nn.Module):
    """Projections and bias table of both kinds of window attention."""

    def __init__(self, dim: int, window_size: int, key_size: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        self.window_size = window_size
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((window_size + key_size - 1) ** 2, num_heads)
        )
        trunc_normal(self.relative_position_bias_table)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, index: Tensor) -> Tensor:
        """Table indices (N, M), possibly flattened → (heads, N, M)."""
        table = self.relative_position_bias_table.t().contiguous()
        return table.index_select(1, index.flatten()).unflatten(1, (self.window_size**2, -1))


class WindowAttention(_BiasedAttention):
    """Multi-head self-attention in windows, see :func:`window_attention`.

    (B, H, W, dim) → (B, H, W, dim).

    Args:
        dim: channels.
        window_size: side of a window; H and W are multiples of it.
        num_heads: heads.
        shift_size: rows and columns to roll the map by before partitioning it.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``shift_size`` ≥ ``window_size``.
    """

    def __init__(self, dim: int, window_size: int, num_heads: int, shift_size: int = 0) -> None:
        super().__init__(dim, window_size, window_size, num_heads)
        if not 0 <= shift_size < window_size:
            raise ValueError(
                f"shift_size must be in 0 … {window_size - 1} (below window_size), got {shift_size}"
            )
        self.shift_size = shift_size

    def forward(
        self, x: Tensor, index: Tensor | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """``index`` and ``masks`` can be passed in to share them between layers.

        Args:
            x: (B, H, W, dim).
            index: :func:`relative_position_index` of the window, flattened or not.
            masks: :func:`shift_masks` of window and shift; unused without a shift.
        """
        if index is None:
            index = relative_position_index(self.window_size, x.device)
        shift = self.shift_size
        if not shift:
            masks = None
        elif masks is None:
            masks = shift_masks(self.window_size, shift, x.dtype, x.device)
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        qkv = _heads_of_windows(self.qkv(x), self.window_size, 3, self.num_heads)
        bias = self.bias(index)
        if masks is None:
            q, k, v = qkv.flatten(0, 2).unbind(1)
            out = _attend(q, k, v, bias).unflatten(0, qkv.shape[:3])
        else:
            out = _attend_shifted(qkv, bias, masks)
        x = self.proj(_map_of_heads(out, self.window_size))
        return x.roll((shift, shift), (1, 2)) if shift else x

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, num_heads={self.num_heads}, "
            f"shift_size={self.shift_size}"
        )


class OverlappingWindowAttention(_BiasedAttention):
    """HAT's multi-head attention of windows to larger windows around them.

    (B, H, W, dim) → (B, H, W, dim). Keys and values beyond the map are zero and not masked: they
    take part in the softmax with their bias.

    Args:
        dim: channels.
        window_size: side of the queries' window; H and W are multiples of it.
        num_heads: heads.
        overlap_ratio: additional size of the keys' window relative to ``window_size``.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or the windows can't be concentric.
    """

    def __init__(
        self, dim: int, window_size: int, num_heads: int, overlap_ratio: float = 0.5
    ) -> None:
        overlap_size = window_size + int(window_size * overlap_ratio)
        if overlap_ratio < 0 or (overlap_size - window_size) % 2:
            raise ValueError(
                f"overlap_ratio {overlap_ratio} grows windows of {window_size} to {overlap_size}; "
                "they must grow by an even number"
            )
        super().__init__(dim, window_size, overlap_size, num_heads)
        self.overlap_size = overlap_size

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """``index`` can be passed in to share it between layers.

        Args:
            x: (B, H, W, dim).
            index: :func:`overlap_position_index` of the windows, flattened or not.
        """
        if index is None:
            index = overlap_position_index(self.window_size, self.overlap_size, x.device)
        query, key_value = self.qkv(x).tensor_split((x.shape[3],), dim=3)
        query = _heads_of_windows(query, self.window_size, 1, self.num_heads).squeeze(3)
        key_value = overlapping_windows(key_value, self.window_size, self.overlap_size)
        key_value = key_value.flatten(0, 2).unflatten(2, (2, self.num_heads, -1))
        k, v = key_value.permute(2, 0, 3, 1, 4)
        out = _attend(query.flatten(0, 2), k, v, self.bias(index))
        out = out.unflatten(0, query.shape[:3])
        return self.proj(_map_of_heads(out, self.window_size))

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, overlap_size={self.overlap_size}, "
            f"num_heads={self.num_heads}"
        )
