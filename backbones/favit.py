"""Factorization Vision Transformer: long-range attention at the cost of local windows.

Haolin Qin et al., "Factorization Vision Transformer: Modeling Long Range Dependency with Local
Window Cost", https://arxiv.org/abs/2312.08614. Written from the paper and a specification of what
the published model computes, since the published code states no licence.

Accepts any input size (from 1×1); the stage at stride s has ⌈H/s⌉ rows. The original needs more
than 96 pixels per side, since it cannot pad a map by more than its size; here, the reflection is
repeated. The normalised map of a stage is both its feature and the next stage's input, including in
detectors and segmenters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d
from torch import nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked
from backbones.core.published import PVT_NAMES, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import TokenStage, make_stages
from ops.attention.factorized import FactorizedAttention
from ops.block import PreNormBlock
from ops.init import init_fan_out
from ops.mlp import DWMlp
from ops.patch import ConvLayerNorm

__all__ = ["FaViT"]


class FaViT(StagedBackbone):
    """Factorization vision transformer.

    Args:
        sr_ratios: downsampling factor of each stage's global branch, and dilation of its second
            local branch; with 1, there is no second local branch.
        window_size: taps per side of the local windows.
    """

    renames = (
        (r"\.attn\.(sr|norm)\.", r".attn.global_branch.\1."),
        (r"\.attn\.kv_g\.", ".attn.global_branch.kv."),
        (r"\.attn\.local_conv_g\.", ".attn.global_branch.local_conv.conv."),
        (r"\.attn\.kv_l\.depth_conv\.", ".attn.kv_dw."),
        (r"\.attn\.kv_l\.point_conv\.", ".attn.kv_pw."),
        (r"\.attn\.fcs\.(\d)\.", r".attn.local_branches.\1.fc."),
        (r"\.attn\.single_heads\.(\d)\.", r".attn.local_branches.\1.kv."),
        (r"\.attn\.local_convs\.(\d)\.", r".attn.local_branches.\1.local_conv.conv."),
        *PVT_NAMES,
    )

    @checked("dims", "num_heads", "mlp_ratios", "sr_ratios")
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 7,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            # Local windows are dilated by the downsampling factor of the global map.
            dim, ratio = dims[i], sr_ratios[i]
            dilations = (1, ratio) if ratio > 1 else (1,)
            attn = FactorizedAttention(dim, num_heads[i], ratio, dilations, window_size)
            mlp = DWMlp(dim, int(dim * mlp_ratios[i]), proj_drop_rate)
            return PreNormBlock(dim, attn, mlp, partial(nn.LayerNorm, eps=1e-6), drop_path)

        self.stem = ConvLayerNorm(in_chans, dims[0], 7, 4, padding=3)
        self.stages = make_stages(
            depths,
            drop_path_rate,
            block,
            lambda i: ConvLayerNorm(dims[i - 1], dims[i]),
            TokenStage,
            norm=lambda i: LayerNorm2d(dims[i], eps=1e-6),
        )
        self.norm = nn.Identity()
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims)
        self.apply(init_fan_out)


_cfg = imagenet_cfg(
    license="none stated",
    origin_url="https://github.com/q2479036243/FaViT",
    paper_name=(
        "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost"
    ),
    paper_ids="arXiv:2312.08614",
)

default_cfgs = {f"favit_b{i}.untrained": _cfg for i in range(4)}

favit_b0 = variant(FaViT, dims=(32, 64, 128, 256), depths=(2, 2, 6, 2), drop_path_rate=0.1)
favit_b1 = variant(FaViT, dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), drop_path_rate=0.1)
favit_b2 = variant(FaViT, dims=(64, 128, 256, 512), depths=(2, 3, 18, 3), drop_path_rate=0.1)
favit_b3 = variant(FaViT, dims=(96, 192, 384, 768), depths=(2, 3, 14, 3), drop_path_rate=0.1)

register_variants(__name__)
