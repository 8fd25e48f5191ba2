"""Whether Python code asks tensors for their sizes.

Code that doesn't does the same at every size, so that what was recorded at some is right at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["SizeReads"]

# Attributes and methods of tensors that give numbers, none of which is a size.
_OF_KIND: set[Any] = {Tensor.dim, Tensor.ndimension, Tensor.element_size, Tensor.get_device}
_OF_KIND |= {vars(torch._C.TensorBase)[name].__get__ for name in ("ndim", "itemsize")}
_WRITTEN_IN = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch._jit_internal")
_ASKING = frozenset(("shape", "size", "numel", "nelement", "stride", "is_same_size"))
# Functions of torch in Python that ask for sizes, but to check them, or only with some arguments.
_UNLESS: dict[Any, Callable[[Mapping[str, Any]], bool]] = {
    F.interpolate: lambda given: bool(given.get("recompute_scale_factor")),
    F.adaptive_avg_pool2d: lambda given: _has_none(given["output_size"]),
    F.adaptive_max_pool2d: lambda given: _has_none(given["output_size"]),
    F.group_norm: lambda given: False,
    F.instance_norm: lambda given: False,
    F.batch_norm: lambda given: False,
}


class SizeReads(TorchFunctionMode):
    """Context that notes whether sizes are read.

    Attributes:
        found: whether they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.found and not (args and isinstance(args[0], nn.Parameter)):
            self.found = _has_sizes(func, result) or _asks(func, args, kwargs or {})
        return result


def _has_sizes(func: Any, result: Any) -> bool:
    """Whether a function of torch gave Python something that depends on sizes."""
    kind = type(result)
    if kind is Tensor or result is None or kind is bool:
        return getattr(func, "__name__", "") == "is_same_size"
    if kind is int or kind is float:
        return func not in _OF_KIND
    if isinstance(result, tuple | list):
        return any(isinstance(part, int | float) for part in result)
    return False


def _asks(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch that is written in Python asks for sizes."""
    if not isinstance(func, FunctionType) or not _asks_ever(func):
        return False
    asks = _UNLESS.get(func)
    if asks is None:
        return True
    names = func.__code__.co_varnames
    return asks({**dict(zip(names, args, strict=False)), **kwargs})


@functools.cache
def _asks_ever(func: FunctionType) -> bool:
    """Whether its code, or that of functions of torch that it refers to, has names of sizes."""
    seen = {func}
    following = [func]
    while following:
        func = following.pop()
        names = func.__code__.co_names
        if not _ASKING.isdisjoint(names):
            return True
        referred = [func.__globals__.get(name) for name in names]
        referred += [cell.cell_contents for cell in func.__closure__ or ()]
        for other in referred:
            if isinstance(other, FunctionType) and other not in seen:
                seen.add(other)
                following += [other] * (other.__module__ in _WRITTEN_IN)
    return False


def _has_none(size: Any) -> bool:
    return size is None or isinstance(size, tuple | list) and None in size
