"""Hybrid Attention Transformer: image restoration with window and channel attention.

Xiangyu Chen et al., "Activating More Pixels in Image Super-Resolution Transformer",
https://arxiv.org/abs/2205.04437; also "HAT: Hybrid Attention Transformer for Image Restoration",
https://arxiv.org/abs/2309.05239.

Maps an RGB image in 0 … ``img_range`` to an image; there is neither a feature pyramid nor a
classifier. Accepts any input size from 1×1: the image is padded by reflection at the right and
bottom to a multiple of the window, and the result is cropped. Where the padding is as large as the
image, which makes the original fail, the reflection is repeated. For large images see
:func:`ops.tiling.run_tiled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, SqueezeExcite
from torch import Tensor, nn

from backbones.common.checks import number, one_of, whole
from backbones.core.base import StagedBackbone
from backbones.core.keywords import SHARE, checked
from backbones.core.published import Rename, children, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import Stage, layer_norm, make_stages
from ops.attention.window import (
    OverlappingWindowAttention,
    WindowAttention,
    overlap_position_index,
    relative_position_index,
    shift_masks,
)
from ops.init import init_trunc_normal
from ops.padding import reflect_pad_to_multiple

__all__ = ["HAT"]

# Mean of the training images, DIV2K.
_RGB_MEAN = (0.4488, 0.4371, 0.4040)
# Weight of the channel branch.
CONV_SCALE = 0.01


class Stem(nn.Module):
    """Mean subtraction (of RGB images), 3×3 convolution, norm: (B, in_chs, …) → (B, dim, H, W)."""

    mean: Tensor

    def __init__(self, in_chs: int, dim: int, img_range: float) -> None:
        super().__init__()
        self.img_range = img_range
        mean = torch.tensor(_RGB_MEAN) if in_chs == 3 else torch.zeros(in_chs)
        # Without a batch axis, since DDP cannot broadcast a 4-D buffer in channels-last format.
        self.register_buffer("mean", mean.view(in_chs, 1, 1), persistent=False)
        self.conv = nn.Conv2d(in_chs, dim, 3, padding=1)
        self.norm = layer_norm(dim)

    def shallow(self, x: Tensor) -> Tensor:
        """The map before the norm, which the long skip connection adds after all stages."""
        return self.conv((x - self.mean) * self.img_range)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.shallow(x))


class ChannelAttentionConv(nn.Module):
    """Two 3×3 convolutions with a bottleneck, followed by channel attention, on (B, dim, H, W).

    ``compress_ratio`` and ``squeeze_factor`` reduce the width in the bottleneck and in the gate.
    """

    def __init__(self, dim: int, compress_ratio: int, squeeze_factor: int) -> None:
        super().__init__()
        if dim < max(compress_ratio, squeeze_factor):
            raise ValueError(
                f"compress_ratio {compress_ratio} and squeeze_factor {squeeze_factor} must be at "
                f"most dim {dim}"
            )
        self.conv1 = nn.Conv2d(dim, dim // compress_ratio, 3, padding=1)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // compress_ratio, dim, 3, padding=1)
        self.se = SqueezeExcite(dim, rd_channels=dim // squeeze_factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.conv2(self.act(self.conv1(x))))


class HybridBlock(nn.Module):
    """Parallel window and channel attention, then MLP: (B, H, W, dim) → (B, H, W, dim)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        compress_ratio: int,
        squeeze_factor: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, shift_size)
        self.conv = ChannelAttentionConv(dim, compress_ratio, squeeze_factor)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor, overlap_index: Tensor) -> Tensor:
        normed = self.norm1(x)
        gated = self.conv(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(normed, index, masks)) + gated * CONV_SCALE
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OverlapBlock(nn.Module):
    """Attention to overlapping windows, then MLP: (B, H, W, dim) → (B, H, W, dim)."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, overlap_ratio: float, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = OverlappingWindowAttention(dim, window_size, num_heads, overlap_ratio)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, index: Tensor, masks: Tensor, overlap_index: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), overlap_index)
        return x + self.mlp(self.norm2(x))


class ResidualGroup(Stage):
    """Hybrid blocks, an overlap block and a 3×3 convolution, with a shortcut."""

    def __init__(
        self, blocks: Sequence[HybridBlock], downsample: None, overlap_block: OverlapBlock
    ) -> None:
        super().__init__([*blocks, overlap_block], downsample)
        dim = overlap_block.attn.proj.in_features
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.window_size = overlap_block.attn.window_size
        self.overlap_size = overlap_block.attn.overlap_size

    def forward(self, x: Tensor) -> Tensor:
        size, device = self.window_size, x.device
        deep = self.run_blocks(
            x.permute(0, 2, 3, 1),
            relative_position_index(size, device).flatten(),
            shift_masks(size, size // 2, x.dtype, device),
            overlap_position_index(size, self.overlap_size, device).flatten(),
        )
        return x + self.conv(deep.permute(0, 3, 1, 2))


class Reconstruction(nn.Module):
    """From features to a larger image: (B, dim, H, W) → (B, out_chs, H·upscale, W·upscale)."""

    def __init__(self, dim: int, out_chs: int, upscale: int, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(dim, width, 3, padding=1)
        self.act = nn.LeakyReLU(0.01)
        self.upsample = nn.Sequential()
        for factor in {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[upscale]:
            self.upsample.append(nn.Conv2d(width, factor**2 * width, 3, padding=1))
            self.upsample.append(nn.PixelShuffle(factor))
        self.conv_out = nn.Conv2d(width, out_chs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.upsample(self.act(self.conv_in(x))))


# But for the place of a group's last block.
_RENAMES: tuple[Rename, ...] = (
    (r"^relative_position_index_.*", ""),  # constants
    (r"^conv_first\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^conv_after_body\.", "body_conv."),
    (r"^conv_before_upsample\.0\.", "head.conv_in."),
    (r"^upsample\.", "head.upsample."),
    (r"^conv_last\.", "head.conv_out."),
    (r"^layers\.(\d+)\.residual_group\.", r"stages.\1."),
    (r"^layers\.", "stages."),
    (r"\.overlap_attn\.(?=qkv|proj|relative_position)", ".overlap_attn.attn."),
    *children(r"\.conv_block\.cab", ".conv.conv1", None, ".conv.conv2"),
    *children(r"\.conv_block\.cab\.3\.attention", None, ".conv.se.fc1", None, ".conv.se.fc2"),
)


class HAT(StagedBackbone):
    """Hybrid attention transformer: (B, in_chans, H, W) → (B, in_chans, H·upscale, W·upscale).

    Its stages are the residual groups, all at the image's resolution.

    Args:
        dim: channels of the body.
        depths, num_heads: hybrid blocks and attention heads of each group.
        window_size: side of the windows; every second block shifts them by half a window.
        overlap_ratio: additional size of the key windows in a group's last block, relative to
            ``window_size``.
        compress_ratio, squeeze_factor: see :class:`ChannelAttentionConv`.
        upscale: 1 … 4; 1 restores an image at its size.
        in_chans: image channels. For three channels, the mean of RGB training images is subtracted.
        img_range: factor between image values and the network's range.
        head_width: channels of the reconstruction.
        residual: learn the difference from bicubic upscaling, starting at zero; not used by the
            published models.
        num_classes: must be 0; there is no classifier.
    """

    classifier = ()
    undecayed = ("relative_position_bias_table",)
    centres_images = True

    stem: Stem

    @checked(
        "num_heads",
        window_size=whole(1, 64),
        overlap_ratio=SHARE,
        upscale=one_of(1, 2, 3, 4),
        img_range=number(0, 1e6, open_below=True),
    )
    def __init__(
        self,
        dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window_size: int = 16,
        overlap_ratio: float = 0.5,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        mlp_ratio: float = 2,
        *,
        upscale: int = 4,
        in_chans: int = 3,
        img_range: float = 1.0,
        head_width: int = 64,
        residual: bool = False,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        self._refuse_classes(num_classes)
        self.upscale, self.residual = upscale, residual
        self.window_size = window_size
        self.stem = Stem(in_chans, dim, img_range)
        self.stages = make_stages(
            depths,
            drop_path_rate,
            lambda i, j, rate: HybridBlock(
                dim,
                num_heads[i],
                window_size,
                window_size // 2 if j % 2 else 0,
                compress_ratio,
                squeeze_factor,
                mlp_ratio,
                rate,
            ),
            stage_type=ResidualGroup,
            overlap_block=lambda i: OverlapBlock(
                dim, num_heads[i], window_size, overlap_ratio, mlp_ratio
            ),
        )
        self.norm = layer_norm(dim)
        self.body_conv: nn.Module = nn.Conv2d(dim, dim, 3, padding=1)
        self.head: nn.Module = Reconstruction(dim, in_chans, upscale, head_width)
        self.describe_features([dim] * len(depths), [1] * len(depths))
        self.renames = _RENAMES + tuple(
            (rf"^stages\.{i}\.overlap_attn\.", f"stages.{i}.blocks.{depth}.")
            for i, depth in enumerate(depths)
        )
        for module in self.modules():
            # Convolutions keep PyTorch's initialisation.
            if isinstance(module, nn.Linear):
                init_trunc_normal(module)
        if residual:
            for parameter in self.head.conv_out.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        image = reflect_pad_to_multiple(x, self.window_size)
        height, width = x.shape[2] * self.upscale, x.shape[3] * self.upscale
        shallow = self.stem.shallow(image)
        deep = self.norm(self.stages(self.stem.norm(shallow)))
        x = self.head(shallow + self.body_conv(deep)) / self.stem.img_range
        if self.residual:
            base = F.interpolate(image, scale_factor=self.upscale, mode="bicubic")
        else:
            base = self.stem.mean
        return (x + base)[:, :, :height, :width]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last group's map, normalised: (B, in_chans, H, W) → (B, dim, H, W)."""
        padded = reflect_pad_to_multiple(x, self.window_size)
        return super().forward_features(padded)[:, :, : x.shape[2], : x.shape[3]]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError(
            "HAT returns images and has no classifier; call the model for the image, or "
            "forward_features for the last map"
        )

    def take_maps(
        self, x: Tensor, taken: Sequence[int], norm: bool, whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Like the base's; maps are cropped to the image's size."""
        height, width = x.shape[2:]
        image = reflect_pad_to_multiple(x, self.window_size)
        last, maps = super().take_maps(image, taken, norm, whole)
        return last[:, :, :height, :width], [m[:, :, :height, :width] for m in maps]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """``num_classes`` must be 0; ``global_pool=""`` removes the reconstruction."""
        self._refuse_classes(num_classes)
        if global_pool == "":
            self.body_conv, self.head = nn.Identity(), nn.Identity()

    @staticmethod
    def _refuse_classes(num_classes: int) -> None:
        if num_classes:
            raise ValueError(f"HAT has no classifier: num_classes must be 0, got {num_classes}")


_SCALES = (2, 3, 4)
_FOLDER = "https://drive.google.com/drive/folders/1HpmReFfoUqUbnAOQ7rvOeNU3uf_m69w0"


_cfg = partial(
    imagenet_cfg,
    url="",
    num_classes=0,
    input_size=(3, 64, 64),
    crop_pct=1.0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    license="apache-2.0",
    origin_url="https://github.com/XPixelGroup/HAT",
    paper_name="Activating More Pixels in Image Super-Resolution Transformer",
    paper_ids="arXiv:2205.04437",
)


def _published(file: str) -> dict[str, Any]:
    return _cfg(notes=(f"{file}.pth in {_FOLDER}",))


# df2k: DIV2K and Flickr2K; in1k_df2k: pre-trained on ImageNet; real_gan: for real photographs.
default_cfgs = {
    "hat_nano_x2.untrained": _cfg(notes=("ours; configs/sr/quickstart.yaml trains it in minutes",)),
    **{f"hat_s_x{n}.df2k": _published(f"HAT-S_SRx{n}") for n in _SCALES},
    **{f"hat_x{n}.in1k_df2k": _published(f"HAT_SRx{n}_ImageNet-pretrain") for n in _SCALES},
    **{f"hat_x{n}.df2k": _published(f"HAT_SRx{n}") for n in _SCALES},
    "hat_x4.real_gan": _published("Real_HAT_GAN_SRx4"),
    "hat_x4.real_gan_sharper": _published("Real_HAT_GAN_SRx4_sharper"),
    **{f"hat_l_x{n}.in1k_df2k": _published(f"HAT-L_SRx{n}_ImageNet-pretrain") for n in _SCALES},
}

_NANO = {
    "dim": 32,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 8,
    "compress_ratio": 2,
    "squeeze_factor": 8,
    "head_width": 32,
    "residual": True,
}
_SMALL = {"dim": 144, "compress_ratio": 24, "squeeze_factor": 24, "drop_path_rate": 0.1}
_BASE = {"dim": 180, "drop_path_rate": 0.1}
_LARGE = {"depths": (6,) * 12, "num_heads": (6,) * 12, **_BASE}

# Our own, for trying things out.
hat_nano_x2 = variant(HAT, **_NANO, upscale=2)
hat_s_x2 = variant(HAT, **_SMALL, upscale=2)
hat_s_x3 = variant(HAT, **_SMALL, upscale=3)
hat_s_x4 = variant(HAT, **_SMALL, upscale=4)
hat_x2 = variant(HAT, **_BASE, upscale=2)
hat_x3 = variant(HAT, **_BASE, upscale=3)
hat_x4 = variant(HAT, **_BASE, upscale=4)
hat_l_x2 = variant(HAT, **_LARGE, upscale=2)
hat_l_x3 = variant(HAT, **_LARGE, upscale=3)
hat_l_x4 = variant(HAT, **_LARGE, upscale=4)

register_variants(__name__)
