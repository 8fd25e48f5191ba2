"""``fuse()``: the steps that prepare a network for inference.

Backbones of this library are folded, and their attention and scans get inference forms. Networks of
other packages, timm, torchvision, transformers, …, keep their layers with their names and weights.
Calls of both are recorded as operators, which are rewritten, see :mod:`ops.rewriting`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from backbones.common.messages import shown
from backbones.fusing.int8_state import Int8Model, Precision
from backbones.fusing.quantization import confirm, quantize, unquantize, warn_if_none
from backbones.fusing.types import (
    OUTPUTS,
    Outputs,
    call_with_types,
    set_types,
    takes_any_float,
)
from ops.cpu import bfloat16
from ops.fuse.replayed import Replayed, replayed_class
from ops.inference import conversion
from ops.inference.layers import convert
from ops.reparam import fuse_children
from ops.rounding import round_filters

__all__ = ["FusableBackbone", "FusedBackbone", "FusedNetwork", "fuse_network"]

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound="FusableBackbone")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that models run in
_DEPTH = 2  # of the parts of a network that are recorded besides the whole
_FEWEST_LAYERS = 2  # with weights, in such a part


def fuse_network(
    model: nn.Module,
    dtype: torch.dtype | Literal["auto"] | None = None,
    channels_last: bool | Literal["auto"] = "auto",
    calibrate: Iterable[Any] | Tensor | None = None,
    max_drop: float | None = None,
    outputs: Outputs = "input",
    *,
    is_backbone: bool = False,
) -> None:
    """Prepare a network for inference in place.

    Networks inside one of another package are recorded, too, which matters where the whole cannot
    be, as with detectors.

    Args:
        dtype, channels_last, calibrate, max_drop, outputs: see
            :meth:`backbones.fusing.fuse.FusableBackbone.fuse`.
        is_backbone: fold it, as a backbone of this library.

    Raises:
        TypeError, ValueError: see there.
    """
    _check(dtype, channels_last, calibrate, max_drop, outputs)
    weight = next(model.parameters(), None)
    if isinstance(model, torch.jit.ScriptModule) and dtype is not None:
        raise ValueError(f"dtype={dtype} is for modules in Python, not for a ScriptModule")
    if weight is None or isinstance(model, torch.jit.ScriptModule):
        model.eval()
        return
    if isinstance(dtype, str):
        if weight.device.type != "cpu":
            raise ValueError(f"dtype='auto' is for models on the CPU, not on {weight.device}")
        dtype = bfloat16.faster_dtype()
    elif dtype == torch.bfloat16 and weight.device.type == "cpu":
        bfloat16.warn_if_slower()
    with torch.inference_mode(False):
        model.eval()
        hooked = {name: module for name, module in model.named_modules() if _has_hooks(module)}
        conversion.leave_inference_mode(model)
        conversion.restore_plain_forms(model)
        if is_backbone:
            fuse_children(model)
        precision: Precision | None = None
        computed = dtype
        if dtype == torch.int8:
            precision, calls = quantize(model, calibrate, max_drop, with_windows=not is_backbone)
            computed = getattr(torch, precision.dtype)
        elif dtype is not None:
            unquantize(model)
        if computed is not None:
            if is_backbone:
                round_filters(model, computed)
            model.to(computed)
        if dtype is not None:
            set_types(model, outputs)
        if channels_last is not False and (
            conversion.to_channels_last(model, always=channels_last is True)
        ):
            _record(model, is_backbone)
        elif takes_any_float(model):
            convert(model, replayed_class(type(model), CastNetwork))
        if dtype is not None and isinstance(model, Int8Model):
            model.precision = precision
            if precision is not None and precision.quantized:
                # Kernels of this library's blocks depend on sizes, so all files of one agree.
                confirm(model, precision, None if is_backbone else calls)
                for module in model.modules():
                    if isinstance(module, Replayed):
                        module.forget()
            if precision is not None:
                warn_if_none(model, precision)
        _warn_of_lost_hooks(hooked, set(model.modules()))


def _check(dtype: Any, channels_last: Any, calibrate: Any, max_drop: Any, outputs: Any) -> None:
    if dtype is not None and dtype not in (*_DTYPES, torch.int8, "auto"):
        kind = TypeError if not isinstance(dtype, torch.dtype) else ValueError
        raise kind(
            f"dtype must be a floating-point one, {', '.join(map(str, _DTYPES))}, "
            f"torch.int8 or 'auto'; got {dtype!r}"
        )
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs must be one of {', '.join(OUTPUTS)}, got {shown(outputs)}")
    if dtype is None and outputs != "input":
        raise ValueError(f"outputs={outputs!r} is for a given dtype, but dtype is None")
    for name, value in (("calibrate", calibrate), ("max_drop", max_drop)):
        if value is not None and dtype != torch.int8:
            raise ValueError(f"{name} is for dtype=torch.int8, but dtype is {dtype}")
    if dtype == torch.int8 and channels_last is False:
        raise ValueError("dtype=torch.int8 needs channels_last, got False")
    number = isinstance(max_drop, int | float) and not isinstance(max_drop, bool)
    if max_drop is not None and not (number and 0 < max_drop < math.inf):
        raise ValueError(f"max_drop must be a positive number or None, got {max_drop!r}")
    if not isinstance(calibrate, Iterable | None) or isinstance(calibrate, str | bytes):
        raise ValueError(
            "calibrate must be what the model's call takes, or batches of it, got a "
            f"{type(calibrate).__name__}"
        )
    if not isinstance(channels_last, bool) and channels_last != "auto":
        raise ValueError(f"channels_last must be True, False or 'auto', got {channels_last!r}")


def _record(model: nn.Module, is_backbone: bool) -> None:
    """Let a network, or networks in it, record and replay their calls."""
    if is_backbone:
        convert(model, replayed_class(type(model), FusedBackbone))
        return
    for network in _networks(model):
        if not isinstance(network, torch.jit.ScriptModule):
            convert(network, replayed_class(type(network), FusedNetwork))


def _networks(model: nn.Module, depth: int = _DEPTH) -> Iterator[nn.Module]:
    """A network and the larger parts of it, without containers."""
    yield model
    for child in model.children() if depth else ():
        is_container = type(child).__module__.startswith("torch.nn.")
        layers = sum(any(True for _ in m.parameters(recurse=False)) for m in child.modules())
        if layers >= _FEWEST_LAYERS and not is_container:
            yield from _networks(child, depth - 1)


def _warn_of_lost_hooks(hooked: Mapping[str, nn.Module], kept: set[nn.Module]) -> None:
    if lost := [name for name, module in hooked.items() if module not in kept]:
        _log.warning(
            "the hooks of %s were removed: fuse() folded it into its neighbours", shown(lost)
        )


# -- classes of fused networks -------------------------------------------------------------------


class FusedNetwork(Int8Model, Replayed):
    """A fused network of another package; its layers are unchanged."""

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` with its arguments and results cast."""
        return call_with_types(method, self, args, kwargs)

    def train(self, mode: bool = True) -> Any:
        """Like ``nn.Module.train``; raises, since replays are for evaluation."""
        _require_evaluation(self, mode)
        return super().train(mode)


def _require_evaluation(model: nn.Module, mode: bool) -> None:
    """Raise a RuntimeError if a fused model is to be trained."""
    if mode:
        raise RuntimeError(
            f"{type(model).__name__} has been fused for inference and cannot be trained; "
            "create the model again, or keep a copy.deepcopy from before fuse()"
        )


class FusedBackbone(Replayed):
    """Rejects inputs and modifications that a fused model's layers would silently get wrong."""

    def run(self, method: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the images and the model, then call ``method``.

        Raises:
            TypeError: not a tensor.
            ValueError: an image of another shape, dtype or device than the layers take.
        """
        symbolic = torch.compiler.is_compiling() or torch.jit.is_tracing()
        takes_images = method.__name__ != "forward_head"
        if takes_images and not (symbolic or isinstance(x, torch.fx.Proxy)):
            with torch._C.DisableTorchFunction():  # hide this from a capture
                _require_images(x, self)
        return call_with_types(method, self, (x, *args), kwargs)


class CastNetwork(Replayed):
    """A network whose calls are not recorded, but take and return any floating-point type."""

    is_recorded = False

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` with its arguments and results cast."""
        return call_with_types(method, self, args, kwargs)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its forward or backward pass."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _require_images(x: Any, model: Any) -> None:
    weight, chans = next(model.parameters()), model.in_chans
    dtypes = "a floating-point type" if takes_any_float(model) else weight.dtype
    expected = (
        f"{type(model).__name__} expects images (B, {chans}, H, W) of {dtypes} on {weight.device}"
    )
    if not isinstance(x, Tensor):
        raise TypeError(f"{expected}, got a {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested tensor" if x.is_nested else f"tensor of layout {x.layout}"
        raise ValueError(f"{expected}, got a {kind}")
    if weight.is_meta:
        return
    dtype, channels = x.dtype, (chans, chans)
    if model.centres_images:
        dtype, channels = torch.promote_types(dtype, weight.dtype), (1, chans)
    if x.is_floating_point() and takes_any_float(model):
        dtype = weight.dtype
    fits = x.ndim == 4 and x.shape[1] in channels and 0 not in x.shape[2:]
    fits &= dtype == weight.dtype or torch.is_autocast_enabled(weight.device.type)
    if not fits or x.device != weight.device:
        raise ValueError(f"{expected}, got {tuple(x.shape)} of {x.dtype} on {x.device}")


class FusableBackbone(Int8Model, nn.Module):
    """A network of ``stages`` with :meth:`fuse`."""

    stages: nn.Sequential

    def fuse(
        self: Model,
        dtype: torch.dtype | Literal["auto"] | None = None,
        channels_last: bool | Literal["auto"] = "auto",
        *,
        calibrate: Iterable[Any] | Tensor | None = None,
        max_drop: float | None = None,
        outputs: Outputs = "input",
    ) -> Model:
        """Optimise the model for inference: fold layers, then choose memory format and kernels.

        Norms, branches and scales are folded into adjacent layers; on a CPU with oneDNN, attention
        and scans then get their inference forms (:mod:`ops.inference`). Names and state dict are
        those of the folded model; outputs are equal up to rounding. There are gradients with
        respect to images, but not to parameters; ``torch.compile`` and ``torch.export`` see the
        plain form of the folded model. Of each kind of call, two are recorded, the third is
        rewritten (:mod:`ops.rewriting`) and captured, and later ones are replayed without Python
        between the kernels until something changes (:mod:`ops.fuse.calls`). Outside of replays,
        malloc keeps up to 256 MiB for the next maps (:mod:`ops.inference.heap`).

        Changes of weights, buffers, attributes, classes, layers and hooks are detected, and calls
        that aren't proved to be the same each time run through torch's Dynamo or plainly
        (docs/guides/what_fuse_watches.md). Writes that torch cannot see, such as through NumPy or
        in place through ``.data``, take effect after the next call of ``fuse()``.

        Modifies the model in place, puts it in eval mode and returns it; a second call with the
        same ``dtype`` has no effect. Afterwards ``train()`` raises.

        With ``torch.int8``, linear layers and pointwise convolutions compute in int8: weights have
        a scale for each output, inputs one for each row, or fixed ones of a calibration. Everything
        else, and layers whose blocks have a kernel of their own, computes as before, with
        parameters and maps in bfloat16 on CPUs with such instructions, else in float32;
        :attr:`precision` lists the layers. Where int8 is not faster (no AVX512-VNNI, AVX-VNNI, AMX
        or SDOT), the model stays in float32 and a warning says so, once.

        Args:
            dtype: of the parameters after folding, and of the maps; calls take images of any
                floating-point dtype. ``"auto"``: float32 or bfloat16, whichever this CPU is faster
                in (:mod:`ops.cpu.bfloat16`). Filters keep their sums (:mod:`ops.rounding`).
                Default: unchanged, also for images.
            channels_last: False: only fold. True: use the channels-last format on any device.
                ``"auto"``: use it where it was measured to be faster, which is on the CPU.
            calibrate: for ``torch.int8``: what the model's call takes, such as preprocessed images
                (B, C, H, W), or batches of it, with or without labels
                (:mod:`backbones.fusing.calibration`), from which inputs get fixed ranges; each is
                run a few times. Default: ranges of each row.
            max_drop: for ``torch.int8``: the largest relative error of the output,
                ‖int8 − float‖ / ‖float‖, on the images of ``calibrate`` or on random ones. The most
                sensitive layers stay in floats, which takes a run for each layer to find out.
                Default: all layers in int8.
            outputs: for a given ``dtype``, the type of floating-point results. ``"input"``: of the
                first floating-point tensor among the arguments; ``"float32"``; or ``"native"``: as
                the network computes them.

        Raises:
            ValueError: ``dtype`` is not floating-point or int8, another argument is invalid, or
                ``calibrate``, ``max_drop`` or ``outputs`` are given for another dtype.
            TypeError: ``dtype`` is not a torch.dtype, for example a string.
        """
        fuse_network(self, dtype, channels_last, calibrate, max_drop, outputs, is_backbone=True)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Like ``nn.Module.load_state_dict``, but rejects weights from before :meth:`fuse`."""
        if self.fused and strict and (foreign := state_dict.keys() - self.state_dict().keys()):
            raise RuntimeError(
                f"{type(self).__name__} has been fused and needs weights that were saved after "
                f"fuse(), not {min(foreign)} and {len(foreign) - 1} other tensors: load weights "
                "from before fuse() into a new model, then fuse it"
            )
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def fused(self) -> bool:
        """Whether :meth:`fuse` (or timm's ``reparameterize_model``) has been called."""
        return any(stage.fused for stage in self.stages)

    def train(self: Model, mode: bool = True) -> Model:
        """Like ``nn.Module.train``; raises for a fused model, whose norms are folded."""
        _require_evaluation(self, mode and self.fused)
        return super().train(mode)
