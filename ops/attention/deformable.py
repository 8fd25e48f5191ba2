"""Multi-scale deformable attention: each query samples several maps at a few learned points.

Xizhou Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
https://arxiv.org/abs/2010.04159. The cost is linear in the number of queries and independent of the
maps' size. Written with torch operators only, so it runs on every device and needs no compiled
extension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops.arguments import checked, require_shapes
from ops.autocast import without_autocast

__all__ = ["DeformableAttention", "deformable_attention", "pixel_centres"]


@checked()
def deformable_attention(
    value: Tensor, sizes: Sequence[Sequence[int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples of several maps.

    Positions and sums are computed in float32 or higher, whatever the dtype of the tensors and of
    autocast: a position in bfloat16 would be off by several pixels on a large map.

    Args:
        value: (B, S, heads, head_dim), the pixels of all maps in row-major order, map after map.
        sizes: height and width of each map; S is the sum of their products.
        locations: (B, N, heads, maps, points, 2), x and y of the samples, where (0, 0) is the
            top left corner of a map and (1, 1) its bottom right one, so that the centres of n
            pixels are at (i + ½) / n. Outside a map, pixels are zero.
        weights: (B, N, heads, maps, points), usually a softmax over the last two axes.

    Returns:
        (B, N, heads · head_dim), in the dtype of ``value``.

    Raises:
        ValueError: no maps, an empty map, or tensors whose shapes don't fit each other.
        TypeError: an argument of another type.
    """
    _check_sizes(sizes)
    require_shapes(
        {"pixels": sum(height * width for height, width in sizes), "maps": len(sizes)},
        value=(value, "batch pixels heads head_dim"),
        locations=(locations, "batch queries heads maps points 2"),
        weights=(weights, "batch queries heads maps points"),
    )
    batch, _, heads, _ = value.shape
    dtype = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    with without_autocast(value.device):
        # To (B · heads, …), which grid_sample treats as a batch, with positions from −1 to 1.
        maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B · heads, head_dim, S)
        grid = (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)
        shares = weights.to(dtype).transpose(1, 2).flatten(0, 1).unsqueeze(1)
        out = maps.new_zeros(())
        start = 0
        for level, (height, width) in enumerate(sizes):
            level_map = maps[:, :, start : start + height * width].unflatten(2, (height, width))
            samples = F.grid_sample(level_map, grid[:, :, level], align_corners=False)
            out = out + (samples * shares[:, :, :, level]).sum(3)  # (B · heads, head_dim, N)
            start += height * width
        return out.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2).to(value.dtype)


def _check_sizes(sizes: Sequence[Sequence[int]]) -> None:
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(
            "sizes must be the height and width of one or more maps, each 1 or more, got "
            f"{[tuple(size) for size in sizes]}"
        )


@checked()
def pixel_centres(
    sizes: Sequence[Sequence[int]],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Relative positions of all pixels of several maps, the reference points of their queries.

    Args:
        sizes: height and width of each map.
        device, dtype: of the result.

    Returns:
        (S, 2), x and y in (0, 1), in the order of ``value`` in :func:`deformable_attention`.

    Raises:
        ValueError: no maps, or an empty one.
    """
    _check_sizes(sizes)
    points = []
    for height, width in sizes:
        y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in (height, width))
        points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
    return torch.cat(points)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with projections, see :func:`deformable_attention`.

    Offsets (in pixels of each map, from a query's reference point) and weights are linear in the
    query. Initially, the weights are equal, and each head samples on a ray of its own direction,
    1, 2, … pixels away.

    Args:
        dim: channels of queries, maps and output.
        num_heads: heads.
        levels: number of maps.
        points: samples of each head on each map.
        value_ratio: channels of the sampled values relative to ``dim``.

    Raises:
        ValueError: ``num_heads`` does not divide the values' channels, or a number below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        levels: int = 1,
        points: int = 4,
        value_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        value_dim = int(dim * value_ratio)
        if num_heads < 1 or value_dim < 1 or value_dim % num_heads:
            raise ValueError(
                f"num_heads must divide the values' channels, got {num_heads} heads for "
                f"{value_dim} channels (dim {dim} · value_ratio {value_ratio})"
            )
        if levels < 1 or points < 1:
            raise ValueError(f"levels and points must be 1 or more, got {levels} and {points}")
        self.num_heads = num_heads
        self.levels = levels
        self.points = points
        self.sampling_offsets = nn.Linear(dim, num_heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * levels * points)
        self.value_proj = nn.Linear(dim, value_dim)
        self.output_proj = nn.Linear(value_dim, dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=1)
        ray = ray / ray.abs().amax(dim=1, keepdim=True)  # onto the border of a square
        steps = torch.arange(1, self.points + 1)[:, None]
        offsets = (ray[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self, query: Tensor, references: Tensor, features: Tensor, sizes: Sequence[Sequence[int]]
    ) -> Tensor:
        """Attention of N queries to the S pixels of ``levels`` maps.

        Args:
            query: (B, N, dim).
            references: (N, 2), relative position of each query, as of :func:`pixel_centres`.
            features: (B, S, dim), the maps, flattened and concatenated.
            sizes: height and width of each map.

        Returns:
            (B, N, dim).

        Raises:
            ValueError: as :func:`deformable_attention`, or a number of maps other than ``levels``.
        """
        if len(sizes) != self.levels:
            raise ValueError(f"sizes must describe {self.levels} maps, got {len(sizes)}")
        shape = (self.num_heads, self.levels, self.points)
        value = self.value_proj(features).unflatten(2, (self.num_heads, -1))
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(-1)
        offsets = self.sampling_offsets(query).unflatten(2, (*shape, 2)).to(references.dtype)
        # One map at a time, since a tensor of the sizes would be copied to the device.
        relative = [
            torch.stack([offset[..., 0] / width, offset[..., 1] / height], dim=-1)
            for offset, (height, width) in zip(offsets.unbind(3), sizes, strict=True)
        ]
        locations = references[:, None, None, None] + torch.stack(relative, dim=3)
        out = deformable_attention(value, sizes, locations, weights.unflatten(3, shape[1:]))
        return self.output_proj(out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, levels={self.levels}, points={self.points}"
