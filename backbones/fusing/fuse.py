"""``fuse()``: the steps that prepare a network for inference.

Backbones of this library are folded, and their attention and scans get inference forms. Networks of
other packages, timm, torchvision, transformers, …, keep their layers with their names and weights.
Calls of both are recorded as operators, which are rewritten, see :mod:`ops.rewriting`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backbones.fusing.fused import FusedBackbone, FusedNetwork, has_hooks, named_briefly
from backbones.fusing.int8_state import Int8Model
from backbones.fusing.precision import Precision
from backbones.fusing.quantization import (
    call,
    check_quantization,
    confirm,
    quantize,
    random_images,
    unquantize,
)
from ops.inference import conversion
from ops.inference.layers import convert
from ops.reparam import fuse_children
from ops.replay.module import recorded_form
from ops.rewriting.module import Rewritten
from ops.rounding import round_filters

__all__ = ["fuse_network"]

_log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that models run in
_DEPTH = 2  # of the parts of a network that are recorded besides the whole
_FEWEST_LAYERS = 2  # with weights, in such a part


def fuse_network(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    channels_last: bool | Literal["auto"] = "auto",
    calibrate: Iterable[Any] | Tensor | None = None,
    max_drop: float | None = None,
    *,
    is_backbone: bool = False,
) -> None:
    """Prepare a network for inference in place.

    Networks inside one of another package are recorded, too, which matters where the whole cannot
    be, as with detectors.

    Args:
        dtype, channels_last, calibrate, max_drop: see
            :meth:`backbones.fusing.fusable.FusableBackbone.fuse`.
        is_backbone: fold it, as a backbone of this library.

    Raises:
        TypeError, ValueError: see there.
    """
    _check(dtype, channels_last, calibrate, max_drop)
    if next(model.parameters(), None) is None:
        model.eval()
        return
    with torch.inference_mode(False):
        model.eval()
        hooked = {name: module for name, module in model.named_modules() if has_hooks(module)}
        conversion.leave_inference_mode(model)
        conversion.restore_plain_forms(model)
        if is_backbone:
            fuse_children(model)
        precision: Precision | None = None
        computed = dtype
        if dtype == torch.int8:
            if calibrate is not None:
                calibrate = [calibrate] if isinstance(calibrate, Tensor) else [*calibrate]
            precision = quantize(model, calibrate, max_drop, with_windows=not is_backbone)
            computed = getattr(torch, precision.dtype)
        elif dtype is not None:
            unquantize(model)
        if computed is not None:
            if is_backbone:
                round_filters(model, computed)
            model.to(computed)
        if channels_last is not False and (
            conversion.to_channels_last(model, always=channels_last is True)
        ):
            _record(model, is_backbone)
        if dtype is not None and isinstance(model, Int8Model):
            model.precision = precision
            if precision is not None and precision.quantized:
                # Kernels of this library's blocks depend on sizes, so all files of one agree.
                _confirm(model, precision, None if is_backbone else calibrate)
        _warn_of_lost_hooks(hooked, set(model.modules()))


def _check(dtype: Any, channels_last: Any, calibrate: Any, max_drop: Any) -> None:
    if dtype is not None and dtype not in (*_DTYPES, torch.int8):
        kind = TypeError if not isinstance(dtype, torch.dtype) else ValueError
        raise kind(
            f"dtype must be a floating-point one, {', '.join(map(str, _DTYPES))}, or "
            f"torch.int8; got {dtype!r}"
        )
    check_quantization(dtype, channels_last, calibrate, max_drop)
    if not isinstance(channels_last, bool) and channels_last != "auto":
        raise ValueError(f"channels_last must be True, False or 'auto', got {channels_last!r}")


def _record(model: nn.Module, is_backbone: bool) -> None:
    """Let a network, or networks in it, record and replay their calls."""
    if is_backbone:
        convert(model, recorded_form(type(model), FusedBackbone))
        return
    for network in _networks(model):
        if not isinstance(network, torch.jit.ScriptModule):
            convert(network, recorded_form(type(network), FusedNetwork))


def _confirm(model: nn.Module, precision: Precision, images: Any) -> None:
    """Leave out layers that are not computed in int8 in a call like the first of ``images``."""
    first = random_images(model) if images is None else images[0]
    image = first[0] if isinstance(first, list | tuple) else first
    if image is None:
        return
    image = image[:1].to(next(model.parameters()).dtype)

    def run() -> None:
        call(model, image)
        model(image)  # if the whole cannot be recorded, its parts are now

    confirm(model, precision, run)
    for module in model.modules():
        if isinstance(module, Rewritten):
            module.forget()


def _networks(model: nn.Module, depth: int = _DEPTH) -> Iterator[nn.Module]:
    """A network and the larger parts of it, without containers."""
    yield model
    for child in model.children() if depth else ():
        is_container = type(child).__module__.startswith("torch.nn.")
        layers = sum(1 for m in child.modules() if _has_weight(m))
        if layers >= _FEWEST_LAYERS and not is_container:
            yield from _networks(child, depth - 1)


def _has_weight(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _warn_of_lost_hooks(hooked: Mapping[str, nn.Module], kept: set[nn.Module]) -> None:
    if lost := [name for name, module in hooked.items() if module not in kept]:
        _log.warning(
            "the hooks of %s were removed: fuse() folded it into its neighbours",
            named_briefly(lost),
        )
