"""``fuse()`` for networks of other packages: timm, torchvision, transformers, …

Their layers stay as they are, with their names and weights. Calls are recorded as operators, which
are rewritten, see :mod:`ops.rewriting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backbones.fusing.int8_state import Int8Model
from backbones.fusing.precision import Precision
from backbones.fusing.quantization import call, confirm, quantize, random_images, unquantize
from ops.inference import conversion
from ops.inference.heap import keep_freed_memory
from ops.inference.layers import convert, has_onednn
from ops.replay.module import recorded_form
from ops.rewriting.module import Rewritten

__all__ = ["AnyModel", "fuse_any"]

_DEPTH = 2  # of the parts of a network that are prepared besides the whole
_FEWEST_LAYERS = 2  # with weights, in such a part


class AnyModel(Int8Model, Rewritten):
    """A network that :func:`fuse_any` has prepared for inference."""

    def train(self, mode: bool = True) -> Any:
        """Like ``nn.Module.train``; raises, since replays compute what evaluation does."""
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} has been fused for inference and cannot be trained; "
                "create the model again, or keep a copy.deepcopy from before fuse()"
            )
        return super().train(mode)


def fuse_any(
    model: nn.Module,
    dtype: torch.dtype | None,
    channels_last: bool | Literal["auto"],
    calibrate: Iterable[Any] | Tensor | None = None,
    max_drop: float | None = None,
) -> nn.Module:
    """Prepare a network for inference in place, and the networks inside it.

    Those inside matter where the whole cannot be recorded, as with detectors.

    Args:
        dtype: convert parameters and buffers; default: unchanged. ``torch.int8``: to the dtype of
            the maps between layers in int8.
        channels_last: False: leave the layers alone. True: use the channels-last format on devices
            without kernels, too.
        calibrate, max_drop: see :meth:`backbones.fusing.fusable.FusableBackbone.fuse`.

    Raises:
        ValueError: ``calibrate`` gives no images that the network takes, or ``max_drop`` needs
            some.
    """
    with torch.inference_mode(False):
        model.eval()
        conversion.leave_inference_mode(model)
        weight = next(model.parameters(), None)
        if weight is None:
            return model
        precision: Precision | None = None
        if dtype == torch.int8:
            if calibrate is not None:
                calibrate = [calibrate] if isinstance(calibrate, Tensor) else [*calibrate]
            precision = quantize(model, calibrate, max_drop, with_windows=True)
            dtype = getattr(torch, precision.dtype)
        elif dtype is not None:
            unquantize(model)
        if dtype is not None:
            model.to(dtype)
        if channels_last is False:
            return model
        weight = next(model.parameters())
        if weight.device.type != "cpu" or not has_onednn(weight.dtype):
            if channels_last is True:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return model
        keep_freed_memory()
        for network in _networks(model):
            if not isinstance(network, AnyModel | torch.jit.ScriptModule):
                convert(network, recorded_form(type(network), AnyModel))
        if dtype is not None and isinstance(model, AnyModel):
            model.precision = precision
            if precision is not None:
                _confirm(model, precision, calibrate)
    return model


def _confirm(model: AnyModel, precision: Precision, images: Any) -> None:
    """Leave out layers that are not computed in int8 in a call like the first of ``images``."""
    first = random_images(model) if images is None else images[0]
    image = first[0] if isinstance(first, list | tuple) else first
    if image is None:
        return
    image = image[:1].to(next(model.parameters()).dtype)

    def run() -> None:
        call(model, image)
        model(image)  # if the whole cannot be recorded, its parts are now

    _forget(model)  # what was recorded before
    confirm(model, precision, run)
    _forget(model)


def _forget(model: nn.Module) -> None:
    """Drop what was recorded of a network and of those inside it."""
    for module in model.modules():
        if isinstance(module, AnyModel):
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
