"""Necks for backbones that start at, or stay at, stride 16, registered with mmengine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from ops.pyramid import SimplePyramid

_INITIAL = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """Feature pyramid from the last map, for single-resolution backbones.

    Of "Exploring Plain Vision Transformer Backbones for Object Detection",
    https://arxiv.org/abs/2203.16527: :class:`ops.pyramid.SimplePyramid`, then a 1×1 and a 3×3
    convolution per level, each with a norm over channels; coarser levels by subsampling.

    Args:
        in_channels, out_channels: of the backbone's last map, and of every level.
        num_outs: number of levels returned, 4 (strides 4 to 32) or more.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dict(init_cfg or _INITIAL))
        self.in_channels = in_channels
        self.num_outs = num_outs
        self.pyramid = SimplePyramid(in_channels)
        if num_outs < len(self.pyramid):
            raise ValueError(f"num_outs must be ≥ {len(self.pyramid)}, got {num_outs}")
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for width in self.pyramid.channels
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(…, (B, in_channels, h, w)) → num_outs maps (B, out_channels, …), 4h × 4w first."""
        last = inputs[-1]
        if last.shape[1] != self.in_channels:
            raise ValueError(
                f"the last map has {last.shape[1]} channels; write in_channels={last.shape[1]}"
            )
        maps = [output(x) for output, x in zip(self.outputs, self.pyramid(last), strict=True)]
        return _with_coarser(maps, self.num_outs)


@MODELS.register_module()
class TransposedFPN(BaseModule):
    """Feature pyramid with finer levels from transposed convolutions.

    For backbones that start at stride 16, as in the detectors of Liu et al., "EfficientViT",
    https://arxiv.org/abs/2305.07027, and Yun and Ro, "SHViT", https://arxiv.org/abs/2401.16456:
    1×1 lateral convolutions and top-down sums, as in any FPN; 2×2 transposed convolutions of
    stride 2 from the finest sum; a 3×3 convolution per level; coarser levels by subsampling. Both
    papers' published detectors compute the same with their ``EfficientViTFPN``.

    Args:
        in_channels, out_channels: of the backbone's maps, fine to coarse, and of every level.
        num_outs: number of levels returned.
        num_transposed: number of levels finer than the backbone's finest: 1 for RetinaNet (from
            stride 8), 2 for Mask R-CNN (from stride 4).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        num_transposed: int = 1,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dict(init_cfg or _INITIAL))
        levels = num_transposed + len(in_channels)
        if num_transposed < 0 or num_outs < levels:
            raise ValueError(
                f"num_transposed must be ≥ 0 and num_outs ≥ {levels} (the backbone's maps and the "
                f"transposed ones), got {num_transposed} and {num_outs}"
            )
        self.in_channels = list(in_channels)
        self.num_outs = num_outs
        self.laterals = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.transposed = nn.ModuleList(
            nn.ConvTranspose2d(out_channels, out_channels, 2, 2) for _ in range(num_transposed)
        )
        self.outputs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(levels)
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, in_channels[i], h, w), fine to coarse → num_outs maps (B, out_channels, …)."""
        given = [x.shape[1] for x in inputs]
        if given != self.in_channels:
            raise ValueError(f"the maps have {given} channels; write in_channels={given}")
        levels = [lateral(x) for lateral, x in zip(self.laterals, inputs, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            size = levels[i - 1].shape[-2:]
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=size, mode="nearest")
        for transposed in self.transposed:
            levels.insert(0, transposed(levels[0]))
        maps = [output(x) for output, x in zip(self.outputs, levels, strict=True)]
        return _with_coarser(maps, self.num_outs)


def _with_coarser(maps: list[Tensor], count: int) -> tuple[Tensor, ...]:
    """``count`` maps: the given ones, followed by repeated subsampling of the last one."""
    while len(maps) < count:
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
    return tuple(maps)
