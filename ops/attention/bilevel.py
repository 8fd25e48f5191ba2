"""Bi-level routing attention: each region selects regions, whose tokens its tokens attend to.

Of BiFormer, https://arxiv.org/abs/2303.08810.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ops.arguments import checked, require_shapes
from ops.attention.softmax import softmax_attention
from ops.sizes import larger, smaller

__all__ = [
    "BiLevelRoutingAttention",
    "bilevel_routing_attention",
    "nearest_regions",
    "route_regions",
]


@checked()
def bilevel_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    region_size: tuple[int, int],
    topk: int,
    scale: float | None = None,
) -> Tensor:
    """Each region's tokens attend to all tokens of the ``topk`` regions nearest to it.

    Keys and values are gathered once per region, so memory grows with H·W·topk·T (T tokens per
    region) instead of (H·W)². If ``region_size`` does not divide the map, it is zero-padded at the
    bottom and right; the padding acts as keys and values, but is ignored by the routing.

    Args:
        query, key: (B, H, W, qk_dim).
        value: (B, H, W, dim).
        num_heads: divides qk_dim and dim.
        region_size: rows and columns of a region.
        topk: number of regions to attend to; clipped to the number of regions.
        scale: of the logits; default: qk_dim^-0.5 as published, not that of the heads' width.

    Returns:
        (B, H, W, dim). The selection of regions is not differentiable.

    Raises:
        ValueError: incompatible shapes, heads, region or ``topk``.
    """
    axes = "batch height width qk_dim"
    require_shapes(query=(query, axes), key=(key, axes), value=(value, "batch height width dim"))
    if num_heads < 1 or query.shape[-1] % num_heads or value.shape[-1] % num_heads:
        raise ValueError(
            f"num_heads must divide qk_dim {query.shape[-1]} and dim {value.shape[-1]}, "
            f"got {num_heads}"
        )
    if min(region_size) < 1 or topk < 1:
        raise ValueError(
            f"region_size and topk must be at least 1, got {tuple(region_size)} and {topk}"
        )
    batch, height, width, qk_dim = query.shape
    scale = qk_dim**-0.5 if scale is None else scale
    rows, columns = _parts(height, region_size[0]), _parts(width, region_size[1])
    regions, tokens = rows * columns, region_size[0] * region_size[1]
    # The number of regions may be symbolic during export; don't add a guard on it.
    everyone = statically_known_true(topk >= regions)
    topk = smaller(topk, regions)
    routes = None if everyone else route_regions(query, key, region_size, topk)
    query, key, value = (_split_regions(t, region_size) for t in (query, key, value))
    if routes is None:
        # All regions attend to all regions, so nothing has to be gathered.
        query, key, value = (t.flatten(1, 2) for t in (query, key, value))  # (B, R·T, …)
    else:
        # Treat regions as rows of an embedding table: a lookup is faster than gather, and its
        # gradient many times faster.
        routes = routes + torch.arange(batch, device=routes.device).view(-1, 1, 1) * regions
        query = query.flatten(0, 1)  # (B·R, T, qk_dim)
        key, value = (
            F.embedding(routes, t.flatten(2).flatten(0, 1)).view(
                query.shape[0], topk * tokens, t.shape[-1]
            )
            for t in (key, value)
        )  # (B·R, topk·T, …)
    query, key, value = (
        t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value)
    )
    out = softmax_attention(query, key, value, scale=scale)  # (B·R, heads, T, …)
    dim = num_heads * out.shape[-1]  # a batch may be empty
    out = out.transpose(1, 2).reshape(batch, rows, columns, *region_size, dim).transpose(2, 3)
    out = out.reshape(batch, rows * region_size[0], columns * region_size[1], dim)
    return out[:, :height, :width]


@checked(ranks={"query": 4, "key": 4})
def route_regions(query: Tensor, key: Tensor, region_size: tuple[int, int], topk: int) -> Tensor:
    """The ``topk`` regions whose mean key is nearest to a region's mean query.

    Args:
        query, key: (B, H, W, qk_dim).
        region_size: rows and columns of a region; regions at the border may be smaller.
        topk: at most the number of regions R = ⌈H/rows⌉·⌈W/columns⌉.

    Returns:
        (B, R, topk) indices of regions in row-major order, unsorted.
    """
    # Half precision would produce ties.
    wide = torch.promote_types(query.dtype, torch.float32)
    query_mean, key_mean = (
        _region_means(t.detach(), region_size).to(wide).transpose(1, 2) for t in (query, key)
    )
    return nearest_regions(query_mean, key_mean, topk)


@checked(ranks={"query_mean": 3, "key_mean": 3})
def nearest_regions(query_mean: Tensor, key_mean: Tensor, topk: int) -> Tensor:
    """Like :func:`route_regions`, given the regions' means.

    Args:
        query_mean, key_mean: (B, R, qk_dim), float32 at least.
        topk: at most R.

    Returns:
        (B, R, topk).
    """
    affinity = (query_mean * query_mean.shape[-1] ** -0.5) @ key_mean.transpose(1, 2)
    return affinity.topk(topk, dim=-1, sorted=False).indices


def _region_means(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) → (B, C, regions): means without padding."""
    if all(isinstance(side, int) for side in region_size):
        return F.avg_pool2d(
            x.permute(0, 3, 1, 2), region_size, ceil_mode=True, count_include_pad=False
        ).flatten(2)
    # Pooling does not support symbolic sizes.
    sums = _split_regions(x, region_size).sum(2)
    counts = _split_regions(x.new_ones(1, *x.shape[1:3], 1), region_size).sum(2)
    return (sums / counts).transpose(1, 2)


def _split_regions(x: Tensor, region_size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) → (B, regions, tokens of a region, C), zero-padded."""
    rows, columns = (_parts(n, side) for n, side in zip(x.shape[1:3], region_size, strict=True))
    x = _pad_to(x, rows * region_size[0], columns * region_size[1])
    x = x.unflatten(2, (columns, region_size[1])).unflatten(1, (rows, region_size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _parts(size: int, part: int) -> int:
    """⌈size / part⌉ without negative numerators, which exporters round towards zero."""
    if statically_known_true(size % part == 0):
        return size // part
    return (size + part - 1) // part


def _pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad (B, H, W, C) at the bottom and right."""
    bottom, right = height - x.shape[1], width - x.shape[2]
    if statically_known_true(bottom == 0) and statically_known_true(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


class BiLevelRoutingAttention(nn.Module):
    """:func:`bilevel_routing_attention` plus a depthwise convolution of the values.

    (B, H, W, dim) → (B, H, W, dim), any H and W.

    Args:
        dim: channels.
        num_heads: divides ``dim``.
        n_win: regions per side.
        topk: regions that each region attends to.
        lepe_kernel_size: of the convolution of the values, the positional term; odd.
        pad_input: behaviour if ``n_win`` does not divide the map. True: the input is zero-padded
            to n_win × n_win regions of equal size, and the padding (the projection's bias after
            projection) is treated like any other token. False: regions have ⌊H/n_win⌋ × ⌊W/n_win⌋
            tokens (at least one), there are as many as necessary, and query, key and value are
            zero-padded.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, the kernel is even, or ``n_win`` or
            ``topk`` is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        *,
        lepe_kernel_size: int = 5,
        pad_input: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        if n_win < 1 or topk < 1:
            raise ValueError(f"n_win and topk must be at least 1, got {n_win} and {topk}")
        if lepe_kernel_size % 2 == 0:
            raise ValueError(f"lepe_kernel_size must be odd, got {lepe_kernel_size}")
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.pad_input = pad_input
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel_size, padding=lepe_kernel_size // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        n_win = self.n_win
        if self.pad_input:
            region_size = (_parts(height, n_win), _parts(width, n_win))
            x = _pad_to(x, n_win * region_size[0], n_win * region_size[1])
        else:
            region_size = (larger(1, height // n_win), larger(1, width // n_win))
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        out = self.attend(query, key, value, region_size)
        out = out + self.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out[:, :height, :width])

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, region_size: tuple[int, int]
    ) -> Tensor:
        """See :func:`bilevel_routing_attention`."""
        return bilevel_routing_attention(query, key, value, self.num_heads, region_size, self.topk)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, "
            f"pad_input={self.pad_input}"
        )
