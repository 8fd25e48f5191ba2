"""LITv2: two stages without attention, then HiLo attention; deformable downsampling.

Zizheng Pan et al., "Fast Vision Transformers with HiLo Attention",
https://arxiv.org/abs/2205.13213. Deformable token merging is from its predecessor LIT,
https://arxiv.org/abs/2105.14217.

Accepts any input size from 29×29. The stem pads to a multiple of 4 and merging drops odd rows: the
first stage has ⌈H/4⌉ rows, halved and rounded down from stage to stage, as in the original's dense
code. The original's classifier only accepts the square size that it was built for; here, it
consists of its norm, average pooling and head on top of the dense network. The paper's segmenters
use ``out_norms=True, num_classes=0``, its detectors ``out_norms=(1, 2, 3), num_classes=0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from backbones.common.checks import several, whole
from backbones.core.base import StagedBackbone
from backbones.core.keywords import SHARE, checked
from backbones.core.published import SWIN_NAMES, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import TokenStage, layer_norm, make_stages
from ops.attention.hilo import HiLoAttention
from ops.autocast import autocasts, without_autocast
from ops.batch_norm import BatchNorm2d
from ops.block import PreNormBlock
from ops.cpu.deformable.deformable_conv import deformable_conv2d, pack_taps
from ops.inference.layers import FastForm, stands_for
from ops.init import init_fan_out
from ops.mlp import DWMlp
from ops.patch import PatchEmbed
from ops.reparam import fold_norm_after

__all__ = ["LITv2"]


class DeformableConv2d(nn.Conv2d):
    """A deformable 2×2 convolution of stride 2, with offsets predicted by another convolution.

    (B, in_chs, H, W) → (B, out_chs, ⌊H/2⌋, ⌊W/2⌋). Half precision is not accurate enough for
    positions, so everything is computed in float32 or higher, even under autocast.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__(in_chs, out_chs, 2, 2)
        # Its channels are (tap, y and x).
        self.offset = nn.Conv2d(in_chs, 8, 2, 2)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if autocasts(x.device):
            with without_autocast(x.device):
                return self._convolve(x)
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        assert self.bias is not None and self.offset.bias is not None
        weight, bias, offset_weight, offset_bias = (
            parameter.to(exact)
            for parameter in (self.weight, self.bias, self.offset.weight, self.offset.bias)
        )
        taken = x.to(exact)
        offset = F.conv2d(taken, offset_weight, offset_bias, stride=2)
        if not torch.compiler.is_exporting():
            # torchvision reads from an arbitrary address for NaN positions. An offset of zero reads
            # the pixels that caused the NaN, so the result is NaN.
            offset = offset.nan_to_num(0.0, math.inf, -math.inf)
        return deform_conv2d(taken, offset, weight, bias, stride=2).to(x.dtype)


@stands_for(DeformableConv2d)
class FastDeformableConv2d(FastForm, DeformableConv2d):
    """The inference form: sampling and linear map in one kernel."""

    kernels: ClassVar = (deformable_conv2d,)

    def fast(self, x: Tensor, derived: Any) -> Tensor:
        out: Tensor = deformable_conv2d(x, self.offset(x), *derived, 2, 2)
        return out

    def derive(self, x: Tensor) -> Any:
        assert self.bias is not None
        return pack_taps(self.weight), self.bias.detach().float()


class DeformableMerging(nn.Module):
    """Deformable convolution, norm, GELU: (B, dim, H, W) → (B, out_dim, ⌊H/2⌋, ⌊W/2⌋)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = DeformableConv2d(dim, out_dim)
        self.norm = BatchNorm2d(out_dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 2:
            raise ValueError(
                f"a map of {x.shape[2]}×{x.shape[3]} cannot be halved; LITv2 needs images of at "
                "least 29×29"
            )
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> nn.Module:
        """The convolution with the folded norm, and the activation."""
        return nn.Sequential(fold_norm_after(self.conv, self.norm), self.act)


class LITv2(StagedBackbone):
    """LITv2.

    Args:
        num_heads: attention heads of each stage; 0 for none.
        window_sizes: of HiLo attention in each stage; with 1, all heads attend to all tokens.
        alpha: fraction of the heads that attend to window averages.
    """

    # Of the original's classifier, detector and segmenter.
    renames = (
        (r"\.downsample\.dconv\.conv_offset\.", ".downsample.conv.offset."),
        (r"\.downsample\.dconv\.", ".downsample.conv."),
        (r"\.downsample\.norm_layer\.", ".downsample.norm."),
        (r"\.attn\.h_", ".attn.high."),
        (r"\.attn\.l_", ".attn.low."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        *SWIN_NAMES,
    )

    @checked(*("dims", "num_heads", "window_sizes"), num_heads=several(whole(0, 1024)), alpha=SHARE)
    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (0, 0, 12, 24),
        window_sizes: Sequence[int] = (1, 1, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: bool | Sequence[int] = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            dim, heads, attn = dims[i], num_heads[i], None
            if heads:
                attn = HiLoAttention(dim, heads, window_sizes[i], alpha)
            mlp = DWMlp(dim, int(dim * mlp_ratio), proj_drop_rate)
            return PreNormBlock(dim, attn, mlp, nn.LayerNorm, drop_path)

        self.stem = PatchEmbed(in_chans, dims[0])
        self.stages = make_stages(
            depths,
            drop_path_rate,
            block,
            lambda i: DeformableMerging(dims[i - 1], dims[i]),
            TokenStage,
        )
        dense = num_classes == 0 and bool(out_norms)
        self.norm = nn.Identity() if dense else layer_norm(dims[-1])
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims, out_norms=out_norms, out_norm_layer=layer_norm)
        for module in self.modules():
            # Convolutions outside the MLPs keep PyTorch's initialisation.
            if isinstance(module, nn.Linear | DWMlp):
                module.apply(init_fan_out)


_cfg = partial(
    imagenet_cfg,
    url="https://github.com/ziplab/LITv2/releases/download/{}.pth",
    license="apache-2.0",
    origin_url="https://github.com/ziplab/LITv2",
    paper_name="Fast Vision Transformers with HiLo Attention",
    paper_ids="arXiv:2205.13213",
)

default_cfgs = {
    "litv2_s.in1k": _cfg("v1.0/litv2_s"),
    "litv2_m.in1k": _cfg("v1.0/litv2_m"),
    "litv2_b.in1k": _cfg("v1.0/litv2_b"),
    "litv2_b_384.in1k": _cfg(
        "v1.0/litv2_b_384", input_size=(3, 384, 384), crop_pct=1.0, crop_mode="squash"
    ),
    "litv2_s_alpha_0_0.in1k": _cfg("v1.1/alpha_0"),
    **{f"litv2_s_alpha_0_{i}.in1k": _cfg(f"v1.1/alpha_0.{i}") for i in (2, 4, 5, 7, 9)},
    "litv2_s_alpha_1_0.in1k": _cfg("v1.1/alpha_1"),
}

_BASE = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (0, 0, 16, 32)}

litv2_s = variant(LITv2, alpha=0.9, drop_path_rate=0.2)
litv2_m = variant(LITv2, depths=(2, 2, 18, 2), alpha=0.9, drop_path_rate=0.3)
litv2_b = variant(LITv2, **_BASE, alpha=0.9, drop_path_rate=0.5)
litv2_b_384 = variant(LITv2, **_BASE, alpha=0.9, drop_path_rate=0.5)
litv2_s_alpha_0_0 = variant(LITv2, alpha=0.0, drop_path_rate=0.2)
litv2_s_alpha_0_2 = variant(LITv2, alpha=0.2, drop_path_rate=0.2)
litv2_s_alpha_0_4 = variant(LITv2, alpha=0.4, drop_path_rate=0.2)
litv2_s_alpha_0_5 = variant(LITv2, alpha=0.5, drop_path_rate=0.2)
litv2_s_alpha_0_7 = variant(LITv2, alpha=0.7, drop_path_rate=0.2)
# As litv2_s, trained again.
litv2_s_alpha_0_9 = variant(LITv2, alpha=0.9, drop_path_rate=0.2)
litv2_s_alpha_1_0 = variant(LITv2, alpha=1.0, drop_path_rate=0.2)

register_variants(__name__)
