"""How many pixels of an image a position of a feature map can see, from kernels and windows.

The receptive field is the side of the square of pixels from which convolutions, poolings and
windows lead to one position of the map, padding included, whatever the weights; after attention
over all positions it is the whole image. Two things do not count: gates by a mean over the whole
map (squeeze-and-excitation, global response norm), which say nothing of a place, and the learned
offsets of deformable convolutions, which may lead anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ops.attention.bilevel import BiLevelRoutingAttention
from ops.attention.cascaded import CascadedGroupAttention
from ops.attention.factorized import FactorizedAttention
from ops.attention.hilo import LowFrequencyAttention
from ops.attention.pooled import PooledAttention
from ops.attention.rank_augmented import RankAugmentedAttention
from ops.attention.single_head import SingleHeadAttention
from ops.attention.window import OverlappingWindowAttention, WindowAttention
from ops.conv import InceptionDWConv2d
from ops.large_kernel import DilatedReparamConv2d
from ops.neighborhood import NeighborhoodAttention2D

__all__ = ["Reach", "ReceptiveField", "reach_of"]

Reach = float
"""Positions of its input that a layer looks at along a side; infinite for all of them."""

_EVERYWHERE = float("inf")
# In the families' own files: BiFormer's attention of all tokens, and MedViTV2's of neighbours in a
# map whose memory is read in another order, so that neighbours lie anywhere.
_EVERYWHERE_IN_FAMILIES = ("GlobalAttention", "WindowedAttention")


class ReceptiveField:
    """Follows the layers of a network in the order in which they run.

    Attributes:
        side: pixels, so far; infinite after global attention.
        stride: pixels between neighbouring positions of the map.
    """

    def __init__(self) -> None:
        self.side: float = 1.0
        self.stride = 1

    def pass_through(self, reach: Reach, stride: int) -> None:
        """Go through one layer."""
        self.side += (reach - 1) * self.stride if reach > 1 else 0
        self.stride *= stride


def reach_of(module: nn.Module, height: int, width: int) -> tuple[Reach, int] | None:
    """Reach and stride of a layer on a map of that size; None if its children tell, or nothing.

    Of branches side by side it is the widest.
    """
    if type(module).__name__ in _EVERYWHERE_IN_FAMILIES:
        return _EVERYWHERE, 1
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            return rule(module, height, width)
    return None


def _everywhere(module: nn.Module, height: int, width: int) -> tuple[Reach, int]:
    return _EVERYWHERE, 1


def _conv(module: Any, height: int, width: int) -> tuple[Reach, int]:
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    return max(spans), module.stride[0]


def _pool(module: Any, height: int, width: int) -> tuple[Reach, int]:
    first = [v if isinstance(v, int) else v[0] for v in (module.kernel_size, module.stride)]
    return first[0], first[1]


def _inception(module: Any, height: int, width: int) -> tuple[Reach, int]:
    return max(module.dwconv_h.kernel_size[0], module.dwconv_hw.kernel_size[0]), 1


def _dilated(module: Any, height: int, width: int) -> tuple[Reach, int]:
    return module.large.conv.kernel_size[0], 1


def _neighborhood(module: Any, height: int, width: int) -> tuple[Reach, int]:
    # At a border the window moves inwards: from corner to corner.
    return 2 * max(
        d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)
    ) + 1, 1


def _windows(module: Any, height: int, width: int) -> tuple[Reach, int]:
    """Of windows that do not overlap: from one corner to the other, on either side."""
    side = module.window_size
    if height <= side and width <= side:
        return _EVERYWHERE, 1
    return 2 * side - 1, 1


def _overlapping(module: Any, height: int, width: int) -> tuple[Reach, int]:
    return module.window_size + module.overlap_size - 1, 1


_RULES: dict[type[nn.Module], Callable[[Any, int, int], tuple[Reach, int]]] = {
    InceptionDWConv2d: _inception,
    DilatedReparamConv2d: _dilated,
    nn.Conv2d: _conv,
    nn.AvgPool2d: _pool,
    NeighborhoodAttention2D: _neighborhood,
    CascadedGroupAttention: _windows,
    OverlappingWindowAttention: _overlapping,
    WindowAttention: _windows,
    BiLevelRoutingAttention: _everywhere,
    FactorizedAttention: _everywhere,
    LowFrequencyAttention: _everywhere,
    PooledAttention: _everywhere,
    RankAugmentedAttention: _everywhere,
    SingleHeadAttention: _everywhere,
}
