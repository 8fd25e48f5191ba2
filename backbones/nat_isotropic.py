"""Isotropic NAT and DiNAT: no pyramid; with ViT-rpb, the baseline they are compared with.

Ali Hassani and Humphrey Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001. Patches of 16×16, twelve blocks of constant width,
and a relative position bias as the only position encoding. In ViT-rpb, every token attends to the
whole map.

Accepts any input size from 32×32 (smaller ones work down to 1×1). The stem's patches are
zero-padded, so a map has ⌈H/16⌉ rows; the original only accepts the square size it was built for. A
map smaller than ``kernel_size`` · dilation is padded inside attention, see :mod:`backbones.nat`.
The bias of ViT-rpb, for 14×14 tokens, is interpolated for other maps, which the original does not
do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from backbones.common.checks import several
from backbones.core.isotropic import IsotropicBackbone
from backbones.core.keywords import BLOCKS, checked
from backbones.core.neighborhood import cfg, neighborhood
from backbones.core.published import SWIN_NAMES
from backbones.core.registry import register_variants, variant
from backbones.core.stage import IsotropicStage, layer_norm, make_stages
from ops.init import init_linear
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import MapAttention, NeighborhoodBlock, resized_bias
from ops.patch import PatchEmbed

__all__ = ["NATIsotropic"]


class NATIsotropic(IsotropicBackbone):
    """Isotropic NAT, DiNAT or ViT-rpb.

    Args:
        dim, depths: width of all blocks, and number of blocks in each of four groups.
        kernel_size: side of the attention window, odd; None for the whole map.
        dilations: of the windows: one for all blocks, or a pattern that is repeated over them.
        map_size: with global attention, side in tokens of the map that the position bias is for.
    """

    # ViT-rpb's files contain a table of indices.
    renames = ((r".*\.attn\.relative_position_index$", ""), *SWIN_NAMES)

    @checked(depths=several(BLOCKS, count=4))
    def __init__(
        self,
        dim: int = 384,
        depths: Sequence[int] = (3, 3, 3, 3),
        num_heads: int = 12,
        mlp_ratio: float = 4,
        kernel_size: int | None = 7,
        dilations: int | Sequence[int] = 1,
        map_size: int = 14,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pyramid: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        pattern = (dilations,) if isinstance(dilations, int) else tuple(dilations)
        if len(pattern) > sum(depths):
            raise ValueError(
                f"dilations must not be longer than the {sum(depths)} blocks of depths "
                f"{tuple(depths)}, got {pattern}"
            )

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            attn: NeighborhoodAttention2D
            if kernel_size is None:
                attn = MapAttention(dim, num_heads, map_size)
            else:
                dilation = pattern[(sum(depths[:i]) + j) % len(pattern)]
                attn = neighborhood(dim, num_heads, kernel_size, dilation)
            return NeighborhoodBlock(attn, mlp_ratio, proj_drop_rate, drop_path)

        self.stem = PatchEmbed(in_chans, dim, 16)
        self.stages = make_stages(depths, drop_path_rate, block, stage_type=IsotropicStage)
        self.norm = layer_norm(dim)
        self.head = ClassifierHead(dim, num_classes, global_pool, drop_rate)
        self.describe_blocks(dim, pyramid=pyramid)
        self.apply(init_linear)

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Also resizes position biases to another kernel size or map."""
        if name.endswith(".rpb"):
            return resized_bias(tensor, shape)
        return super().resize_tensor(name, tensor, shape)


default_cfgs = {
    f"{variant}.in1k": cfg(f"dinat/checkpoints/isotropic/{variant}_in1k_224")
    for variant in (
        *("nat_isotropic_small", "dinat_isotropic_small", "vitrpb_small"),
        *("nat_isotropic_base", "dinat_isotropic_base", "vitrpb_base"),
    )
}

_SMALL: dict[str, Any] = dict(dim=384, num_heads=12, drop_path_rate=0.1)
_BASE: dict[str, Any] = dict(dim=768, num_heads=24, drop_path_rate=0.4)

nat_isotropic_small = variant(NATIsotropic, **_SMALL)
nat_isotropic_base = variant(NATIsotropic, **_BASE)
dinat_isotropic_small = variant(NATIsotropic, **_SMALL, dilations=(1, 2))
dinat_isotropic_base = variant(NATIsotropic, **_BASE, dilations=(1, 2))
vitrpb_small = variant(NATIsotropic, **_SMALL, kernel_size=None)
vitrpb_base = variant(NATIsotropic, **_BASE, kernel_size=None)

register_variants(__name__)
