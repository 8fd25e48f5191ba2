"""The cost of a model, part by part: parameters, multiply-accumulates, and share of the time."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.cli.receptive_field import ReceptiveField, follow
from backbones.core.base import StagedBackbone
from backbones.core.inputs import channels_of
from ops.neighborhood import NeighborhoodAttention2D


@dataclass
class Part:
    """The stem, a stage, or the head (everything after the stages).

    Of a model of timm: a module that has weights (of containers, their entries), or the rest.

    Attributes:
        shape: (C, H, W) of its output map, without the batch; the output's for ``head``.
        params: parameters.
        macs: multiply-accumulates for one image, of convolutions and matrix products.
        receptive_field: side in pixels; infinite for the whole image; None after the stages, and
            in models of timm.
        share: of the forward pass's time; None if not measured.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    macs: int
    receptive_field: float | None = None
    share: float | None = None


@torch.no_grad()
def measure(model: Any, height: int, width: int, runs: int = 0) -> list[Part]:
    """The parts of a model in execution order.

    Everything except the time is determined on the meta device, without computing.

    Args:
        height, width: of the image.
        runs: forward passes to take median times over; 0 for no times.
    """
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    dtype = next(model.parameters()).dtype
    images = torch.empty(1, channels_of(model), height, width, dtype=dtype, device="meta")
    parts: list[Part] = []
    is_ours = isinstance(model, StagedBackbone)
    field = ReceptiveField() if is_ours else None
    counter = _counter()
    counted = 0

    def record(name: str, module: nn.Module, value: Tensor) -> None:
        nonlocal counted
        total = _macs(counter)
        params = sum(p.numel() for p in module.parameters())
        side = None if field is None else field.side
        parts.append(Part(name, tuple(value.shape[1:]), params, total - counted, side))
        counted = total

    with (
        counter,
        _correct_attention(shadow, counter),
        nullcontext() if field is None else follow(shadow, field),
        _at_ends(shadow, record),
    ):
        output = shadow(images)
    rest = sum(p.numel() for p in model.parameters()) - sum(part.params for part in parts)
    last = Part(
        "head" if is_ours else "rest", tuple(output.shape[1:]), rest, _macs(counter) - counted
    )
    parts.append(last)
    if runs:
        shares = time_shares(model, height, width, runs)
        for part, share in zip(parts, shares, strict=True):
            part.share = share
    return parts


def count_macs(model: Any, height: int, width: int) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image."""
    return sum(part.macs for part in measure(model, height, width))


@torch.inference_mode()
def time_shares(model: Any, height: int, width: int, runs: int) -> list[float]:
    """Shares of a forward pass's time, for the parts of :func:`measure`; they add up to 1.

    Each is the median over ``runs`` passes with one image, after a warm-up pass.
    """
    parameter = next(model.parameters())
    images = torch.zeros(
        1, channels_of(model), height, width, dtype=parameter.dtype, device=parameter.device
    )
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        if parameter.device.type == "cuda":
            torch.cuda.synchronize(parameter.device)
        stamps.append(time.perf_counter())

    passes: list[list[float]] = []
    with _at_ends(model, stamp):
        for _ in range(runs + 1):
            stamps.clear()
            stamp()
            model(images)
            stamp()
            passes.append([b - a for a, b in zip(stamps, stamps[1:], strict=False)])
    medians = [statistics.median(column) for column in zip(*passes[1:], strict=True)]
    return [median / sum(medians) for median in medians]


@contextmanager
def _removed_after(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _at_ends(model: Any, call: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``call(name, module, output)`` after each part but the last.

    These are the stem (all before the stages) and each stage.
    """

    def stem_ended(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        call("stem", model.stem, inputs[0])

    def ended(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: call(name, module, _first(output))

    handles: list[Any] = []
    if isinstance(model, StagedBackbone):
        handles.append(model.stages[0].register_forward_pre_hook(stem_ended))
        parts = [(f"stage {i}", stage) for i, stage in enumerate(model.stages, start=1)]
    else:
        parts = _modules_of(model)
    handles += [module.register_forward_hook(ended(name)) for name, module in parts]
    with _removed_after(handles):
        yield


def _first(output: Any) -> Tensor:
    """The first tensor of a module's output."""
    return output if isinstance(output, Tensor) else _first(output[0])


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules with weights that a model of timm consists of, and the entries of containers."""
    found = []
    for name, module in model.named_children():
        is_container = isinstance(module, nn.Sequential | nn.ModuleList)
        inner = module.named_children() if is_container else [("", module)]
        found += [(f"{name}.{key}".rstrip("."), part) for key, part in inner]
    return [(name, part) for name, part in found if any(True for _ in part.parameters())]


def _counter() -> FlopCounterMode:
    assert torchvision.ops is not None  # it registers the operator
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.torchvision.deform_conv2d: _deform_conv_flops,
        torch.ops.vision_backbones.na_mix: _mix_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _macs(counter: FlopCounterMode) -> int:
    return counter.get_total_flops() // 2


def _deform_conv_flops(
    image: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Counted as a dense convolution of the same size, without sampling."""
    return 2 * math.prod(weight[1:]) * math.prod(out_shape)


def _mix_flops(weights: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(weights) * value[-1]


@contextmanager
def _correct_attention(model: nn.Module, counter: FlopCounterMode) -> Iterator[None]:
    """Count neighborhood attention by its definition, not by a backend's full tiles."""
    before: list[int] = []
    handles = []
    total = counter.flop_counts["Global"]

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before.append(sum(total.values()))

    def leave(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        batch, *size, dim = inputs[0].shape
        padded = [
            max(n, k * d) if module.small_maps == "pad" else n
            for n, k, d in zip(size, module.kernel_size, module.dilation, strict=True)
        ]
        window = [min(k, n) for k, n in zip(module.kernel_size, padded, strict=True)]
        projections = math.prod(size) * 4 * dim * dim
        attention = math.prod(padded) * 2 * math.prod(window) * dim
        exact = 2 * batch * (projections + attention)
        total[_NEIGHBORHOOD] += exact - (sum(total.values()) - before.pop())

    for module in model.modules():
        if isinstance(module, NeighborhoodAttention2D):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    with _removed_after(handles):
        yield


# The operator's name under which the corrections are counted.
_NEIGHBORHOOD = "neighborhood attention"
