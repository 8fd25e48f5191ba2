"""The receptive field of feature maps, from kernel and window sizes.

The receptive field is the side of the square of pixels that a position of the map depends on
through convolutions, poolings and windows, padding included, for any weights; after global
attention it is the whole image. Two things are not counted: gates by a mean over the whole map
(squeeze-and-excitation, global response norm), which carry no spatial information, and the learned
offsets of deformable convolutions, which are unbounded.

The positions of a map form a grid in the image: a 4 × 4 convolution of stride 4 without padding
centres them in its patches, one of 7 × 7 with padding 3 puts them on the patches' upper left pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ops.attention.cascaded import CascadedGroupAttention


class Step(NamedTuple):
    """The spatial extent of a layer."""

    reach: float  # input positions per side that an output depends on; infinite for all of them
    stride: int = 1  # input positions between adjacent outputs
    shift: float = 0.0  # from the first input position to the centre of the first output's field


_EVERYWHERE = Step(float("inf"))


class ReceptiveField:
    """The receptive field accumulated over a network's layers in execution order."""

    def __init__(self) -> None:
        self.side: float = 1.0  # in pixels; infinite after global attention
        self.stride = 1  # pixels between adjacent positions of the map
        # Pixels from the image's edge to the centre of the first position's field; that of position
        # i is at ``start + i * stride``.
        self.start = 0.5

    def pass_through(self, step: Step) -> None:
        """Add one layer."""
        self.side += (step.reach - 1) * self.stride if step.reach > 1 else 0
        self.start += step.shift * self.stride
        self.stride *= step.stride


@contextmanager
def follow(model: nn.Module, field: ReceptiveField) -> Iterator[None]:
    """Update ``field`` as the layers of ``model`` run."""
    inside: list[nn.Module] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shape = inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else ()
        if len(shape) == 4:
            sides = shape[2:] if isinstance(module, CascadedGroupAttention) else shape[1:3]
            found = step_of(module, *sides)
        elif len(shape) == 3:
            found = step_of(module, shape[1], 1)
        else:
            found = None
        if found is not None:
            if not inside:
                field.pass_through(found)
            inside.append(module)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if inside and inside[-1] is module:
            inside.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if ".shortcut" in name:  # beside layers that reach further
                continue
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        yield


def step_of(module: nn.Module, height: int, width: int) -> Step | None:
    """A layer's extent on a map of that size; None if its children determine it, or it has none.

    For parallel branches, the widest one.
    """
    for kind in type(module).__mro__:
        if (rule := _RULES.get(kind.__name__)) is not None:
            return rule if isinstance(rule, Step) else rule(module, height, width)
    return None


def _conv(module: Any, height: int, width: int) -> Step:
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    return Step(max(spans), module.stride[0], (spans[0] - 1) / 2 - module.padding[0])


def _pool(module: Any, height: int, width: int) -> Step:
    side, stride, padding = (
        v if isinstance(v, int) else v[0]
        for v in (module.kernel_size, module.stride, module.padding)
    )
    return Step(side, stride, (side - 1) / 2 - padding)


def _inception(module: Any, height: int, width: int) -> Step:
    return Step(max(module.dwconv_h.kernel_size[0], module.dwconv_hw.kernel_size[0]))


def _neighborhood(module: Any, height: int, width: int) -> Step:
    # Windows are shifted inwards at borders, so the reach is from corner to corner.
    kernel_size, _, dilation, _ = module.window((height, width))
    spans = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
    return Step(2 * max(spans) + 1)


def _windows(module: Any, height: int, width: int) -> Step:
    """Non-overlapping windows: from one corner to the other, in both directions."""
    side = module.window_size
    if height <= side and width <= side:
        return _EVERYWHERE
    return Step(2 * side - 1)


# By the names of classes, since families define some of them. The kernels of OverLoCK's dynamic
# blocks depend on the whole context, MedViTV2's LocalBlock reinterprets a map's memory in another
# order, so that neighbours may come from anywhere, and scans see everything. OverLoCK's overview
# runs beside the map, and its two convolutions of stride 2 are parallel.
_RULES: dict[str, Step | Callable[[Any, int, int], Step]] = {
    **{"Conv2d": _conv, "AvgPool2d": _pool, "MaxPool2d": _pool, "PatchMerging": Step(2, 2, 0.5)},
    **{"InceptionDWConv2d": _inception, "NeighborhoodAttention2D": _neighborhood},
    "DilatedReparamConv2d": lambda module, *_: Step(module.large.conv.kernel_size[0]),
    "OverlappingWindowAttention": lambda m, *_: Step(m.window_size + m.overlap_size - 1),
    **dict.fromkeys(("CascadedGroupAttention", "WindowAttention"), _windows),
    **dict.fromkeys(("BiLevelRoutingAttention", "FactorizedAttention"), _EVERYWHERE),
    **dict.fromkeys(("LowFrequencyAttention", "PooledAttention"), _EVERYWHERE),
    **dict.fromkeys(("RankAugmentedAttention", "SingleHeadAttention"), _EVERYWHERE),
    **dict.fromkeys(("GlobalAttention", "LocalBlock", "FoldedLocalBlock"), _EVERYWHERE),
    **dict.fromkeys(("WKVAttention", "GatedScan", "Mixing", "SelectiveScan2d"), _EVERYWHERE),
    **{"DynamicBlock": _EVERYWHERE, "Overview": Step(1), "Halving": Step(3, 2)},
}
