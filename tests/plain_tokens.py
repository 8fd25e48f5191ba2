"""A single-resolution network whose blocks are plain feed-forwards."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import ClassifierHead, LayerNorm2d
from torch import Tensor, nn

from backbones import IsotropicBackbone, IsotropicStage
from backbones.core.registry import register_variants, variant
from ops.position import PositionTable


class Block(nn.Module):
    """A residual feed-forward on (B, h, w, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class PlainTokens(IsotropicBackbone):
    """16 × 16 patches, a position table, and feed-forwards."""

    first_conv = "stem.0"

    def __init__(
        self,
        dim: int = 16,
        depths: Sequence[int] = (3, 3, 3, 3),
        *,
        img_size: int = 64,
        num_classes: int = 1000,
        in_chans: int = 3,
        pyramid: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dim, 16, 16), PositionTable(dim, img_size // 16, std=1.0)
        )
        self.stages = nn.Sequential(
            *(IsotropicStage([Block(dim) for _ in range(depth)]) for depth in depths)
        )
        self.norm = LayerNorm2d(dim)
        self.head = ClassifierHead(dim, num_classes, "avg")
        self.describe_blocks(dim, pyramid=pyramid)


default_cfgs = {
    "plain_tokens.untrained": {"url": "", "num_classes": 1000, "input_size": (3, 64, 64)}
}
plain_tokens = variant(PlainTokens)  # registered by register_plain_tokens


def register_plain_tokens() -> None:
    """Register the network with us, and the network and its pyramid with timm."""
    register_variants(__name__)
