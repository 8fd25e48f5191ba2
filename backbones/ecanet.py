"""ECA-Net: ResNets and a MobileNetV2 whose blocks gate their channels by a short 1-D convolution.

Qilong Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
https://arxiv.org/abs/1910.03151.

Accepts any input size from 32×32; the stage at stride s has ⌈H/s⌉ rows. The published kernel sizes
of the attention follow no formula: they differ by network and stage, and are the last axis of its
weights. A file with other sizes loads into a network created with its ``attn_kernel_sizes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead, DropPath
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked
from backbones.core.published import children, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import channels_before, make_stages
from ops.attention.channel import EfficientChannelAttention
from ops.conv import ConvNorm
from ops.mobile import MBConv, MixHead

__all__ = ["ECAMobileNetV2", "ECAResNet"]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, or a 3×3 between pointwise ones; channel attention; the shortcut; ReLU.

    (B, dim, H, W) → (B, out_dim, ⌈H / stride⌉, ⌈W / stride⌉).

    Args:
        kernel_size: of the channel attention.
        bottleneck: the second form, with ``out_dim // 4`` channels inside.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int = 1,
        bottleneck: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        inner = out_dim // 4 if bottleneck else out_dim
        first = [ConvNorm(dim, inner, act_layer=nn.ReLU)] if bottleneck else []
        three = ConvNorm(inner if bottleneck else dim, inner, 3, stride, act_layer=nn.ReLU)
        self.convs = nn.Sequential(*first, three, ConvNorm(inner, out_dim, 1 if bottleneck else 3))
        self.eca = EfficientChannelAttention(kernel_size)
        is_same = stride == 1 and dim == out_dim
        self.shortcut = nn.Identity() if is_same else ConvNorm(dim, out_dim, 1, stride)
        self.drop_path = DropPath(drop_path)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.drop_path(self.eca(self.convs(x))))


class ECAMBConv(MBConv):
    """An inverted bottleneck with channel attention before the shortcut; narrow in stage 0."""

    def __init__(
        self, dim: int, out_dim: int, stride: int = 1, drop_path: float = 0.0, stage: int = 1
    ) -> None:
        super().__init__(dim, out_dim, 3, 6 if stage else 1, stride, drop_path=drop_path)
        self.eca = EfficientChannelAttention(1 if out_dim < 96 else 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.eca(self.project(self.dwconv(self.expand(x))))
        return x + self.drop_path(out) if self.has_shortcut else out


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ECAResNet(StagedBackbone):
    """ResNet with efficient channel attention; a stage's first 3×3 convolution halves the map.

    Args:
        dims: output channels of each stage, multiples of 4 with ``bottleneck``.
        attn_kernel_sizes: of each stage's channel attention, odd.
        bottleneck: blocks of three convolutions, see :class:`ResidualBlock`.
    """

    first_conv = "stem.0.conv"
    # The original's names are those of torchvision's ResNet.
    renames = (
        *((r"^conv1\.", "stem.0.conv."), (r"^bn1\.", "stem.0.norm."), (r"^fc\.", "head.fc.")),
        *((rf"^layer{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        *((rf"\.conv{i + 1}\.", f".convs.{i}.conv.") for i in range(3)),
        *((rf"\.bn{i + 1}\.", f".convs.{i}.norm.") for i in range(3)),
        *((r"\.downsample\.0\.", ".shortcut.conv."), (r"\.downsample\.1\.", ".shortcut.norm.")),
    )

    @checked("dims", "attn_kernel_sizes")
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        attn_kernel_sizes: Sequence[int] = (3, 5, 7, 7),
        stem_dim: int = 64,
        *,
        bottleneck: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        if bottleneck and any(dim % 4 for dim in dims):
            raise ValueError(f"dims must be multiples of 4 with bottleneck, got {dims}")

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            dim = dims[i] if j else (stem_dim, *dims)[i]
            stride = 2 if i and not j else 1
            size = attn_kernel_sizes[i]
            return ResidualBlock(dim, dims[i], size, stride, bottleneck, drop_path)

        stages = make_stages(depths, drop_path_rate, block)
        first = ConvNorm(in_chans, stem_dim, 7, 2, act_layer=nn.ReLU)
        self.stem = nn.Sequential(first, nn.MaxPool2d(3, 2, 1))
        self.stages = stages
        self.norm = nn.Identity()
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims)
        self.apply(_init_weights)


class ECAMobileNetV2(StagedBackbone):
    """MobileNetV2 with efficient channel attention.

    Args:
        dims: output channels of each block, by stage. The first block of a stage halves the map,
            except in the first stage, which has stride 2 and belongs to the stem.
    """

    first_conv = "stem.0.conv"

    @checked()
    def __init__(
        self,
        stem_dim: int = 32,
        dims: Sequence[Sequence[int]] = (
            *((16,), (24,) * 2, (32,) * 3),
            *((64,) * 4 + (96,) * 3, (160,) * 3 + (320,)),
        ),
        head_hidden_dim: int = 1280,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.25,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        if len(dims) < 2:
            raise ValueError(f"dims must have blocks at stride 2, then other stages, got {dims}")

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            dim = channels_before(stem_dim, dims, i, j)
            return ECAMBConv(dim, dims[i][j], 2 if i and not j else 1, drop_path, i)

        made: Any = make_stages([len(stage) for stage in dims], drop_path_rate, block)
        first = ConvNorm(in_chans, stem_dim, 3, 2, act_layer=nn.ReLU6)
        self.stem = nn.Sequential(first, *made[0].blocks)
        self.stages = nn.Sequential(*made[1:])
        self.norm = nn.Identity()
        self.head = MixHead(dims[-1][-1], head_hidden_dim, num_classes, global_pool, drop_rate)
        self.describe_features([stage[-1] for stage in dims[1:]], head_hidden_size=head_hidden_dim)
        self.apply(_init_weights)
        # The original counts blocks through all stages.
        blocks = [name for name, m in self.named_modules() if isinstance(m, ECAMBConv)]
        places = children("^features", "stem.0", *blocks, "head.mix")
        self.renames = (*places, *_MOBILENET_NAMES)


_MOBILENET_NAMES = (
    (r"^classifier\.1\.", "head.fc."),
    # Blocks of the stem have no expansion.
    *((rf"^(stem\.\d+)\.conv\.{i}\.", rf"\1.conv.{i + 1}.") for i in (3, 2, 1, 0)),
    *((rf"\.conv\.{i}\.", f".{name}.") for i, name in enumerate(("expand", "dwconv"))),
    *((r"\.conv\.2\.", ".project.conv."), (r"\.conv\.3\.", ".project.norm.")),
    *((r"\.conv\.4\.", ".eca."), (r"\.0\.(\w+)$", r".conv.\1"), (r"\.1\.(\w+)$", r".norm.\1")),
)

# Published on Google Drive, one file each.
_cfg = imagenet_cfg(
    interpolation="bilinear",
    license="mit",
    origin_url="https://github.com/BangguWu/ECANet",
    paper_name="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    paper_ids="arXiv:1910.03151",
)

default_cfgs = {
    **{f"eca_resnet{depth}.in1k": _cfg for depth in (18, 34, 50, 101, 152)},
    "eca_mobilenet_v2.in1k": _cfg,
}
_WIDE: dict[str, Any] = dict(dims=(256, 512, 1024, 2048), bottleneck=True)

eca_resnet18 = variant(ECAResNet)
eca_resnet34 = variant(ECAResNet, depths=(3, 4, 6, 3), attn_kernel_sizes=(3, 3, 5, 7))
eca_resnet50 = variant(ECAResNet, **_WIDE, depths=(3, 4, 6, 3), attn_kernel_sizes=(3, 5, 5, 7))
eca_resnet101 = variant(ECAResNet, **_WIDE, depths=(3, 4, 23, 3), attn_kernel_sizes=(3, 3, 5, 7))
eca_resnet152 = variant(ECAResNet, **_WIDE, depths=(3, 8, 36, 3), attn_kernel_sizes=(3, 3, 5, 7))
eca_mobilenet_v2 = variant(ECAMobileNetV2)

register_variants(__name__)
