"""The activations that kernels can fuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation.

    Attributes:
        plain: torch's function.
        operators: as ATen calls it: operators with the arguments after the first.
        onednn: attribute, scalars and algorithm of oneDNN's; None if torch applies it afterwards.
    """

    plain: Callable[[Tensor], Tensor]
    operators: tuple[tuple[object, ...], ...] = ()
    onednn: tuple[str, list[float | None], str] | None = None


# In the order of `activation::Kind` in common/activation.h. oneDNN's ReLU converts NaN to 0;
# torch's takes another pass, 1 % of the time of a 3×3 convolution with 64 channels.
_TABLE = {
    "none": Activation(lambda x: x, onednn=("none", [], "")),
    "relu": Activation(F.relu, ((_aten.relu.default,),)),
    "gelu": Activation(F.gelu, ((_aten.gelu.default, "none"),), ("gelu", [], "none")),
    "silu": Activation(F.silu, ((_aten.silu.default,),), ("swish", [], "")),
    "hardswish": Activation(F.hardswish, ((_aten.hardswish.default,),), ("hardswish", [], "")),
    "relu6": Activation(
        F.relu6,
        ((_aten.relu6.default,), (_aten.hardtanh.default, 0.0, 6.0)),
        ("hardtanh", [0.0, 6.0], ""),
    ),
    "sigmoid": Activation(Tensor.sigmoid, ((_aten.sigmoid.default,),)),
    "tanh": Activation(Tensor.tanh, ((_aten.tanh.default,),)),
    "squared_relu": Activation(lambda x: F.relu(x).square_()),
    "hardsigmoid": Activation(F.hardsigmoid, ((_aten.hardsigmoid.default,),)),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"),
        ((_aten.gelu.default, "tanh"),),
        ("gelu", [], "tanh"),
    ),
}
ACTIVATIONS = tuple(_TABLE)


def activation_of(name: str) -> Activation:
    """The activation of a name in :data:`ACTIVATIONS`."""
    return _TABLE[name]


def require_activation(name: str) -> None:
    """Raise a ValueError for activations that kernels cannot apply."""
    if name not in _TABLE:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")
