"""Simple feature pyramid of "Exploring Plain Vision Transformer Backbones for Object Detection".

https://arxiv.org/abs/2203.16527. Plain transformers have maps of one stride, but detectors and
decoders need several. The pyramid derives each level from the last map by separate layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

__all__ = ["SimplePyramid"]


class SimplePyramid(nn.ModuleList):
    """Maps of 4, 2, 1 and ½ times the resolution of the input.

    The levels use two 2×2 transposed convolutions of stride 2 with a norm and GELU in between, one
    such convolution, the identity, and 2×2 max pooling. A map at stride 16 gives strides 4, 8, 16
    and 32. The paper's detectors add a 1×1 and a 3×3 convolution to each level
    (:class:`backbones.openmmlab.SimpleFPN` includes them); decoders have their own.

    (B, dim, h, w) → [(B, dim // 4, 4h, 4w), (B, dim // 2, 2h, 2w), (B, dim, h, w),
    (B, dim, ⌈h / 2⌉, ⌈w / 2⌉)].

    Args:
        dim: channels of the map, a multiple of 4.

    Attributes:
        channels: of the levels.
        scales: resolution of the levels relative to the input.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """

    scales: tuple[float, ...] = (4, 2, 1, 0.5)

    def __init__(self, dim: int) -> None:
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        self.channels = (dim // 4, dim // 2, dim, dim)
        super().__init__(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                    LayerNorm2d(dim // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
                ),
                nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, x: Tensor, levels: Sequence[int] | None = None) -> list[Tensor]:
        """The maps, fine to coarse; ``levels`` selects some of them."""
        return [level(x) for i, level in enumerate(self) if levels is None or i in levels]
