"""Visual Attention Network: a convolutional transformer with large-kernel attention.

Meng-Hao Guo et al., "Visual Attention Network", https://arxiv.org/abs/2202.09741.

Accepts any input size from 32×32 (smaller ones work down to 1×1); the stage at stride s has ⌈H/s⌉
rows. The normalised map of a stage is both its feature and the next stage's input. Detectors and
segmenters of the paper use ``norm_eps=1e-5``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from timm.layers import ClassifierHead, LayerNorm2d, LayerScale2d
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked
from backbones.core.published import PVT_NAMES, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import make_stages
from ops.attention.large_kernel import LargeKernelAttention
from ops.batch_norm import BatchNorm2d
from ops.block import PreNormBlock
from ops.conv import ConvNorm
from ops.init import init_fan_out
from ops.reparam import fold_norm_before, fold_scale_after, norm_affine

__all__ = ["VAN"]


class Attention(nn.Module):
    """Pointwise, GELU, large-kernel attention, pointwise, and a shortcut, on (B, dim, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.lka = LargeKernelAttention(dim)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.lka(self.act(self.proj_in(x))))


class ConvMlp(nn.Module):
    """Pointwise, 3×3 depthwise, GELU, pointwise: (B, dim, H, W) → (B, dim, H, W)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.dwconv(self.fc1(x))))
        return self.drop(self.fc2(x))


class Block(PreNormBlock):
    """Attention and MLP with batch norms and layer scales, on (B, dim, H, W)."""

    def __init__(
        self, dim: int, mlp_ratio: float, drop: float, drop_path: float, layer_scale: float
    ) -> None:
        attn, mlp = Attention(dim), ConvMlp(dim, int(dim * mlp_ratio), drop)
        super().__init__(dim, attn, mlp, BatchNorm2d, drop_path, layer_scale, LayerScale2d)

    def fuse(self) -> nn.Module:
        """Fold norms and layer scales into the pointwise convolutions; see :class:`FoldedBlock`."""
        norms = isinstance(self.norm1, nn.BatchNorm2d) and isinstance(self.norm2, nn.BatchNorm2d)
        return FoldedBlock(self) if norms else self


class FoldedBlock(nn.Module):
    """A block in eval mode with its norms and layer scales folded, on (B, dim, H, W).

    ``x + ls1(attn(norm1(x)))`` becomes ``folded_attn(x) + scale * x``, since the shortcut inside
    the attention includes norm and layer scale.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        scale, shift = norm_affine(block.norm1)
        gamma = block.ls1.gamma.detach()
        attn, mlp = block.attn, block.mlp
        attn.proj_in = fold_norm_before(block.norm1, attn.proj_in)
        attn.proj_out = fold_scale_after(attn.proj_out, gamma, gamma * shift.detach())
        mlp.fc1 = fold_norm_before(block.norm2, mlp.fc1)
        mlp.fc2 = fold_scale_after(mlp.fc2, block.ls2.gamma)
        self.attn, self.mlp = attn, mlp
        self.scale = nn.Parameter(gamma * scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x * self.scale.view(1, -1, 1, 1)
        return x + self.mlp(x)


class VAN(StagedBackbone):
    """Visual Attention Network.

    Args:
        norm_eps: of the norm after each stage; the paper's dense networks use 1e-5.
    """

    # Names of the original, which counts from 1, and of mmpretrain.
    renames = (
        (r"\.projection\.", ".proj."),
        (r"\.DW_conv\.", ".conv0."),
        (r"\.DW_D_conv\.", ".conv_spatial."),
        (r"\.proj_1\.", ".proj_in."),
        (r"\.proj_2\.", ".proj_out."),
        (r"\.spatial_gating_unit\.conv0\.", ".lka.dw."),
        (r"\.spatial_gating_unit\.conv_spatial\.", ".lka.dw_dilated."),
        (r"\.spatial_gating_unit\.conv1\.", ".lka.pw."),
        (r"\.layer_scale_([12])$", r".ls\1.gamma"),
        *PVT_NAMES,
    )

    @checked("dims", "mlp_ratios")
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 12, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 0.01,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        self.stem = ConvNorm(in_chans, dims[0], 7, 4, bias=True)
        self.stages = make_stages(
            depths,
            drop_path_rate,
            lambda i, j, rate: Block(dims[i], mlp_ratios[i], proj_drop_rate, rate, layer_scale),
            lambda i: ConvNorm(dims[i - 1], dims[i], 3, 2, bias=True),
            norm=lambda i: LayerNorm2d(dims[i], eps=norm_eps),
        )
        self.norm = nn.Identity()
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims)
        self.apply(init_fan_out)


_cfg = partial(
    imagenet_cfg,
    crop_pct=0.9,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    license="apache-2.0",
    origin_url="https://github.com/Visual-Attention-Network/VAN-Classification",
    paper_name="Visual Attention Network",
    paper_ids="arXiv:2202.09741",
)
_HUB = "https://huggingface.co/Visual-Attention-Network/"
_MM = "https://download.openmmlab.com/mmclassification/v0/van/"

default_cfgs = {
    "van_b0.in1k": _cfg(_HUB + "VAN-Tiny-original/resolve/main/van_tiny_754.pth.tar"),
    "van_b1.in1k": _cfg(_HUB + "VAN-Small-original/resolve/main/van_small_811.pth.tar"),
    "van_b2.in1k": _cfg(_HUB + "VAN-Base-original/resolve/main/van_base_828.pth.tar"),
    "van_b3.in1k": _cfg(_HUB + "VAN-Large-original/resolve/main/van_large_839.pth.tar"),
    "van_b4.in22k_ft_in1k": _cfg(_MM + "van-b4_3rdparty_in1k_20220909-f4665b92.pth"),
    # Published as backbones without classifier. The * makes the untrained form the default.
    "van_b4.in22k": _cfg(_MM + "van-b4_3rdparty_in21k_20220909-db926b18.pth", num_classes=0),
    "van_b5.in22k": _cfg(_MM + "van-b5_3rdparty_in21k_20220909-18e904e3.pth", num_classes=0),
    "van_b5.untrained*": _cfg(),
    "van_b6.in22k": _cfg(_MM + "van-b6_3rdparty_in21k_20220909-96c2cb3a.pth", num_classes=0),
    "van_b6.untrained*": _cfg(),
}

van_b0 = variant(VAN, dims=(32, 64, 160, 256), depths=(3, 3, 5, 2), drop_path_rate=0.1)
van_b1 = variant(VAN, dims=(64, 128, 320, 512), depths=(2, 2, 4, 2), drop_path_rate=0.1)
van_b2 = variant(VAN, dims=(64, 128, 320, 512), depths=(3, 3, 12, 3), drop_path_rate=0.1)
van_b3 = variant(VAN, dims=(64, 128, 320, 512), depths=(3, 5, 27, 3), drop_path_rate=0.2)
van_b4 = variant(VAN, dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), drop_path_rate=0.2)
van_b5 = variant(VAN, dims=(96, 192, 480, 768), depths=(3, 3, 24, 3), drop_path_rate=0.2)
van_b6 = variant(VAN, dims=(96, 192, 384, 768), depths=(6, 6, 90, 6), drop_path_rate=0.3)

register_variants(__name__)
