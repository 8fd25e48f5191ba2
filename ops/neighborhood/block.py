"""The transformer block of NAT, DiNAT and their variants.

Ali Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Size, Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ops.block import PreNormBlock
from ops.neighborhood.modules import NeighborhoodAttention2D
from ops.reparam import fold_scale_after

__all__ = ["MapAttention", "NeighborhoodBlock", "resized_bias"]


class NeighborhoodBlock(PreNormBlock):
    """Pre-norm block of attention and MLP, with optional layer scale.

    (B, H, W, dim) → (B, H, W, dim).

    Args:
        attn: neighborhood or global attention.
        layer_scale: initial value of the layer scales; None for none.
    """

    def __init__(
        self,
        attn: NeighborhoodAttention2D,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        layer_scale: float | None = None,
    ) -> None:
        dim = attn.embed_dim
        mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        super().__init__(dim, attn, mlp, nn.LayerNorm, drop_path, layer_scale)

    def fuse(self) -> nn.Module:
        """Fold the layer scales into the preceding layers.

        The folded layers get other names, so that weights of one form don't load into the other.
        """
        if not (isinstance(self.ls1, LayerScale) and isinstance(self.ls2, LayerScale)):
            return self
        self.attn.proj = fold_scale_after(self.attn.proj, self.ls1.gamma)
        self.mlp.fc2 = fold_scale_after(self.mlp.fc2, self.ls2.gamma)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        return nn.Sequential(OrderedDict(folded=self))


class MapAttention(NeighborhoodAttention2D):
    """Global attention with a relative position bias that is interpolated for other map sizes.

    (B, H, W, dim) → (B, H, W, dim).

    Args:
        map_size: side of the map that the bias is for.
    """

    def __init__(self, dim: int, num_heads: int, map_size: int) -> None:
        super().__init__(dim, num_heads, map_size, rel_pos_bias=True)

    def window(self, size: Sequence[int]) -> tuple[Any, Any, Any, Tensor | None]:
        """The whole map."""
        assert self.rpb is not None
        rpb: Tensor = self.rpb
        sides = [2 * n - 1 for n in size]
        if not all(
            statically_known_true(a == b) for a, b in zip(sides, rpb.shape[1:], strict=True)
        ):
            rpb = _bicubic(rpb, sides)
        return tuple(size), (1, 1), (1, 1), rpb


def resized_bias(tensor: Tensor, shape: Size) -> Tensor | None:
    """Resize a position bias (heads, rows, columns) bicubically, like the authors do."""
    if tensor.ndim != 3 or len(shape) != 3 or len(tensor) != shape[0]:
        return None
    return _bicubic(tensor, shape[1:])


def _bicubic(tensor: Tensor, size: Sequence[int]) -> Tensor:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).unsqueeze(0)
    return F.interpolate(wide, tuple(size), mode="bicubic")[0].to(tensor.dtype)
