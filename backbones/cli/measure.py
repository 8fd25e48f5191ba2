"""The cost of a model, part by part: parameters, multiply-accumulates, and share of the time."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import backbones
from backbones.cli.receptive_field import ReceptiveField, follow
from backbones.core.base import StagedBackbone
from backbones.core.inputs import channels_of
from ops.neighborhood import BACKENDS, Inputs, NAParams, NeighborhoodAttention2D


@dataclass
class Part:
    """The stem, a stage, or the head (everything after the stages).

    Of a model of timm: a module that has weights (of containers, their entries), or the rest.
    """

    name: str
    shape: tuple[int, ...]  # (C, H, W) of its output map; the output's for ``head``
    params: int
    macs: int  # for one image, of convolutions and matrix products, not of scans
    # Side in pixels, infinite for the whole image; None after the stages, and in models of timm.
    receptive_field: float | None = None
    share: float | None = None  # of the time of all calls, see :func:`backbones.explain`


@torch.no_grad()
def measure(model: Any, height: int, width: int, runs: int = 0) -> list[Part]:
    """The parts of a model in execution order; without ``runs``, without their times.

    Everything except the time is determined on the meta device, without computing.
    """
    shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    dtype = next(model.parameters()).dtype
    images = torch.empty(1, channels_of(model), height, width, dtype=dtype, device="meta")
    parts: list[Part] = []
    is_ours = isinstance(model, StagedBackbone)
    field = ReceptiveField() if is_ours else None
    counter = _counter()
    counted = 0

    for layer in shadow.modules():
        if isinstance(layer, NeighborhoodAttention2D):
            layer.attend = partial(_attend_in_windows, layer)  # type: ignore[method-assign]

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal counted
        total = counter.get_total_flops() // 2
        params = sum(p.numel() for p in module.parameters())
        side = None if field is None else field.side
        parts.append(Part(name, tuple(_first(output).shape[1:]), params, total - counted, side))
        counted = total

    def end_stem(stage: nn.Module, inputs: Any) -> None:
        record("stem", shadow.stem, (), inputs)

    with counter, ExitStack() as hooks:
        if field is None:
            modules = _modules_of(shadow)
        else:
            modules = [(f"stage {i}", stage) for i, stage in enumerate(shadow.stages, start=1)]
            hooks.enter_context(follow(shadow, field))
            hooks.enter_context(shadow.stages[0].register_forward_pre_hook(end_stem))
        for name, module in modules:
            hooks.enter_context(module.register_forward_hook(partial(record, name)))
        output = shadow(images)
    rest = sum(p.numel() for p in model.parameters()) - sum(part.params for part in parts)
    name, shape = "head" if is_ours else "rest", tuple(output.shape[1:])
    parts.append(Part(name, shape, rest, counter.get_total_flops() // 2 - counted))
    if runs:
        calls = backbones.explain(model, (height, width), repeats=runs).calls
        names = _parts_of([call.layer for call in calls], [part.name for part in parts])
        seconds: dict[str, float] = defaultdict(float)
        for name, call in zip(names, calls, strict=True):
            seconds[name] += call.seconds
        for part in parts:
            part.share = seconds[part.name] / sum(seconds.values())
    return parts


def count_macs(model: Any, height: int, width: int) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image."""
    return sum(part.macs for part in measure(model, height, width))


def part_of(layer: str) -> str:
    """The part of a network that a layer is in, by its path: a stage, or another module."""
    names = layer.split(".")
    staged = names[0] == "stages" and len(names) > 1
    return f"stage {int(names[1]) + 1}" if staged else names[0] or "model"


def _parts_of(layers: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Those of ``names`` to which the calls of a forward pass belong, by the paths of layers."""
    now = names[0]
    for layer in layers:
        if names[-1] == "rest":  # a model of timm
            now = next((name for name in names if f"{layer}.".startswith(f"{name}.")), "rest")
        elif (part := part_of(layer)) in names[1:-1]:
            now = part
        elif now != "stem":
            now = "head"
        yield now


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
        torch.ops.vision_backbones.map_scan: _map_scan_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _deform_conv_flops(
    image: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Counted as a dense convolution of the same size, without sampling."""
    return 2 * math.prod(weight[1:]) * math.prod(out_shape)


def _mix_flops(weights: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(weights) * value[-1]


def _map_scan_flops(
    x: Any, projected: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """The matrix product that makes the steps, without the scan."""
    return 2 * math.prod(x[:3]) * math.prod(weight)


def _attend_in_windows(module: Any, qkv: Tensor) -> Tensor:
    """Neighborhood attention by its definition: backends work on full tiles, which count more."""
    query, key, value = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(dim=-3)
    kernel_size, stride, dilation, rpb = module.window(query.shape[1:-2])
    params = NAParams(kernel_size, stride, dilation, module.is_causal, module.scale, False)
    out, _ = BACKENDS["reference"].attend(Inputs(query, key, value, rpb=rpb), params)
    return out.flatten(-2)
