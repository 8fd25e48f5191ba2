"""Conversion of a folded model's layers to their inference forms, in place.

Importing this module registers the forms of layers of ``ops``, timm and torch; families register
those of their blocks.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ops.cpu import policy
from ops.inference import (  # noqa: F401  (they register their forms)
    attention,
    conv,
    kan,
    layers,
    norm,
    window,
)
from ops.inference.heap import keep_freed_memory

__all__ = ["leave_inference_mode", "restore_plain_forms", "to_channels_last"]

_log = logging.getLogger(__name__)


def to_channels_last(model: nn.Module, *, always: bool) -> bool:
    """Convert a folded model to channels last if that is faster, or ``always``.

    On a CPU with oneDNN, all layers with an inference form are converted; elsewhere, only the
    convolutions' weights change their memory format. Parameters no longer require gradients, since
    the plain forms would run otherwise. Layers that have a form already are converted again.

    Returns:
        Whether the layers were converted.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False  # of lazy ones, too
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not layers.has_onednn(weight.dtype):
        if always:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return False
    if not policy.multiplies(weight.dtype):
        _warn_not_faster(weight.dtype)
    keep_freed_memory()
    for module in model.modules():
        fast = layers.FORMS.get(type(module))
        # Blocks' forms pass more than a map to their attention; token pooling only applies to the
        # map.
        if fast is not None and not hasattr(module, "token_pooling"):
            layers.convert(module, fast)
    return True


@functools.cache  # once is enough
def _warn_not_faster(dtype: torch.dtype) -> None:
    _log.warning(
        "this CPU has no instructions for %s: it halves the memory of weights and maps, but is not "
        "faster than float32, and often slower",
        str(dtype).removeprefix("torch."),
    )


def restore_plain_forms(model: nn.Module) -> None:
    """Undo :func:`to_channels_last`, except for memory formats."""
    for module in model.modules():
        plain = vars(type(module)).get("stands_for")
        if plain is not None:
            module.__class__ = plain
            for name in ("_derived", "_made_from", "decisions", "_calls"):
                vars(module).pop(name, None)


def leave_inference_mode(model: nn.Module) -> None:
    """Replace inference-mode tensors by ordinary ones, whose modifications torch counts."""
    ordinary: dict[int, Tensor] = {}  # a tensor may be in several places
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is None or is_lazy(t) or not t.is_inference():
                    continue
                if id(t) not in ordinary:
                    other = t.clone()
                    is_parameter = tensors is module._parameters
                    ordinary[id(t)] = (
                        nn.Parameter(other, t.requires_grad) if is_parameter else other
                    )
                tensors[name] = ordinary[id(t)]  # type: ignore[assignment]
