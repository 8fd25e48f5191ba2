"""Cascaded group attention of EfficientViT: each head's input includes the previous head's output.

https://arxiv.org/abs/2305.07027
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ops.arguments import checked
from ops.conv import ConvNorm
from ops.sizes import smaller

__all__ = [
    "CascadedGroupAttention",
    "cascaded_group_attention",
    "distance_bias",
    "resize_distance_table",
]

_MOST_KNOWN = 64  # sizes; windows of 7×7 have 49

Projection = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@checked(ranks={"x": 4})
def cascaded_group_attention(
    x: Tensor, projections: Sequence[Projection], bias: Tensor | None = None
) -> Tensor:
    """Attention over all positions of a map, one head after the other.

    Head i uses its slice of the channels, plus the output of head i − 1, as the input of its
    projection and computes softmax(q·kᵀ / √qk_dim + bias)·v.

    Args:
        x: (B, dim, H, W).
        projections: one per head, from its slice (B, dim / heads, H, W) to query and key, both
            (B, qk_dim, H, W), and value (B, dim / heads, H, W).
        bias: (heads, HW, HW), added to the logits.

    Returns:
        (B, dim, H, W): the concatenated outputs of the heads.

    Raises:
        ValueError: the channels are not divisible by the number of heads.
    """
    heads = len(projections)
    if heads == 0 or x.shape[1] % heads:
        raise ValueError(f"{x.shape[1]} channels are not divisible by {heads} heads")
    outputs: list[Tensor] = []
    for head, (share, project) in enumerate(zip(x.chunk(heads, dim=1), projections, strict=True)):
        query, key, value = project(share + outputs[-1] if outputs else share)
        q, k, v = (t.flatten(2) for t in (query, key, value))  # (B, width, HW)
        # Windows are small: two plain matrix products without copies are faster than fused
        # attention, which needs positions before channels.
        scale = q.shape[1] ** -0.5
        if bias is None:
            logits = (scale * q).transpose(1, 2) @ k
        else:
            logits = torch.baddbmm(bias[head], q.transpose(1, 2), k, alpha=scale)
        outputs.append((v @ logits.softmax(dim=-1).transpose(1, 2)).reshape(value.shape))
    return torch.cat(outputs, dim=1)


@checked(ranks={"table": 3})
def resize_distance_table(table: Tensor, height: int, width: int) -> Tensor:
    """Resize a table (heads, h, w) → (heads, height, width) bicubically, if necessary."""
    # Interpolation to the same size is the identity, so symbolic sizes need no comparison.
    if all(
        statically_known_true(n == m) for n, m in zip(table.shape[1:], (height, width), strict=True)
    ):
        return table
    return F.interpolate(table.unsqueeze(0), size=(height, width), mode="bicubic").squeeze(0)


@checked(ranks={"table": 3})
def distance_bias(table: Tensor) -> Tensor:
    """The bias between all pairs of positions, from a table by distance.

    Args:
        table: (heads, H, W), for row and column distances 0 … H − 1 and 0 … W − 1.

    Returns:
        (heads, HW, HW): entry (i, j) belongs to query i and key j, in row-major order.
    """
    return table.flatten(1)[:, _distance_index(table.shape[1], table.shape[2], table.device)]


_known_indices: dict[tuple[int, int, torch.device], Tensor] = {}


def _distance_index(height: int, width: int, device: torch.device) -> Tensor:
    """(HW, HW): index into the flattened bias table for each pair of positions.

    Cached for the blocks of a network, except while compiling or tracing, where sizes and tensors
    are symbolic.
    """
    if torch.compiler.is_compiling() or not isinstance(height * width, int):
        return _compute_distance_index(height, width, device)
    index = _known_indices.get((height, width, device))
    if index is None:
        with torch.inference_mode(False):  # so that a gradient may be saved with it
            index = _compute_distance_index(height, width, device)
        if type(index) is Tensor and len(_known_indices) < _MOST_KNOWN:
            _known_indices[height, width, device] = index
    return index


def _compute_distance_index(height: int, width: int, device: torch.device) -> Tensor:
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    row_distance = (rows[:, None] - rows).abs() * width
    column_distance = (columns[:, None] - columns).abs()
    index = row_distance[:, None, :, None] + column_distance[None, :, None, :]
    return index.flatten(2).flatten(0, 1)  # (H, W, H, W) → (HW, HW)


class _HeadProjection(nn.Module):
    """Query, key and value of one head; the query also passes a depthwise convolution.

    (B, dim, H, W) → (B, qk_dim, H, W) twice and (B, dim, H, W).
    """

    def __init__(self, dim: int, qk_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.splits = (qk_dim, qk_dim, dim)
        self.qkv = ConvNorm(dim, 2 * qk_dim + dim)
        self.dwconv = ConvNorm(qk_dim, qk_dim, kernel_size, groups=qk_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).split(self.splits, dim=1)
        return self.dwconv(query), key, value


class CascadedGroupAttention(nn.Module):
    """:func:`cascaded_group_attention` within windows, followed by a ReLU and a projection.

    (B, dim, H, W) → (B, dim, H, W). A map no larger than a window is a single window. A larger one
    is zero-padded at the bottom and right to a multiple of the window; as in the original, padding
    is not masked. The bias table is interpolated if its side differs from the window's.

    Args:
        dim: channels of the map.
        num_heads: heads; each gets ``dim / num_heads`` channels.
        qk_dim: width of query and key of a head.
        window_size: side of the windows.
        kernel_sizes: of the depthwise convolution of each head's query; extra values are ignored.
        table_size: side of the table of biases by distance; default: ``window_size``.

    Raises:
        ValueError: channels not divisible by the heads, too few or even kernel sizes, or an empty
            window or table.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int = 16,
        window_size: int = 7,
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        table_size: int | None = None,
    ) -> None:
        super().__init__()
        table_size = window_size if table_size is None else table_size
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads ≥ 1, got {dim} and {num_heads}")
        if window_size < 1 or table_size < 1:
            raise ValueError(
                f"window_size and table_size must be ≥ 1, got {window_size} and {table_size}"
            )
        if len(kernel_sizes) < num_heads or any(k % 2 == 0 for k in kernel_sizes):
            raise ValueError(
                f"kernel_sizes must be {num_heads} odd numbers, one per head, got {kernel_sizes}"
            )
        self.window_size = window_size
        self.table_size = table_size
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, table_size**2))
        self.heads = nn.ModuleList(
            _HeadProjection(dim // num_heads, qk_dim, kernel_sizes[i]) for i in range(num_heads)
        )
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, norm_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        size = self.window_size
        rows, columns = (height + size - 1) // size, (width + size - 1) // size
        if statically_known_true(rows * columns == 1):
            return self._attend(x)
        padded = F.pad(x, (0, columns * size - width, 0, rows * size - height))
        windows = self._attend(_to_windows(padded, rows, columns))
        out = _from_windows(windows, rows, columns)[:, :, :height, :width]
        if isinstance(height, int) and isinstance(width, int):
            return out
        # With symbolic sizes, both cases are possible; crop to the map in case of a single window.
        first = self._attend(x[:, :, : smaller(height, size), : smaller(width, size)])
        first = F.pad(first, (0, width - first.shape[3], 0, height - first.shape[2]))
        is_map = 1 // (rows * columns)
        return first * is_map + out * (1 - is_map)

    def _attend(self, x: Tensor) -> Tensor:
        """Within whole maps: (N, dim, h, w) → (N, dim, h, w)."""
        bias = self.bias(*x.shape[2:])
        return self.proj(self.act(cascaded_group_attention(x, list(self.heads), bias)))

    def bias(self, height: int, width: int) -> Tensor:
        """See :func:`distance_bias`."""
        table = self.attention_biases.unflatten(1, (self.table_size, self.table_size))
        return distance_bias(resize_distance_table(table, height, width))

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, table_size={self.table_size}"


def _to_windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, C, H, W) → (B · rows · columns, C, H / rows, W / columns)."""
    x = x.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _from_windows(windows: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`_to_windows`."""
    x = windows.unflatten(0, (-1, rows, columns))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
