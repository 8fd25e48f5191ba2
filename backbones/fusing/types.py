"""The types that a fused model takes and returns, whatever it computes in.

A model that ``fuse()`` converted takes floating-point tensors of any type and returns the type that
it was given. Both casts are operators of torch that read no values, so that they are recorded with
the network's own.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "OUTPUTS",
    "Outputs",
    "call_with_types",
    "converted",
    "set_types",
    "takes_any_float",
    "tensors",
]

Outputs = Literal["input", "float32", "native"]
OUTPUTS: tuple[Outputs, ...] = get_args(Outputs)

_NAME = "_fused_types"  # of a model's attribute
_OTHERS = (bool, int, float, str, bytes, bytearray, nn.Module)  # without tensors of a call


class _Types(NamedTuple):
    """What ``fuse()`` decided.

    Attributes:
        path, name: of a floating-point parameter, whose dtype is the model's now.
    """

    outputs: Outputs
    path: tuple[str, ...]
    name: str


class _Thread(threading.local):
    model: nn.Module | None = None  # whose arguments have been cast


_thread = _Thread()


def set_types(model: nn.Module, outputs: Outputs) -> None:
    """Let :func:`call_with_types` cast a model's arguments and results.

    The decision is an attribute of the model, so it is in copies and pickles.

    Args:
        outputs: the type of results: of the first floating-point tensor among the arguments
            (``"input"``), float32, or what the network computes (``"native"``).
    """
    names = (name for name, p in model.named_parameters() if p.is_floating_point())
    if (found := next(names, None)) is not None:
        *path, name = found.split(".")
        vars(model)[_NAME] = _Types(outputs, tuple(path), name)


def takes_any_float(model: nn.Module) -> bool:
    """Whether floating-point arguments of a model are cast, as :func:`set_types` asked for."""
    return _NAME in vars(model)


def call_with_types(
    method: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``method(model, *args, **kwargs)``, with arguments and results cast (:func:`set_types`).

    Floating-point tensors among the arguments are cast to the dtype of the model's parameters, and
    those among the results back. They may be anywhere in tuples, lists, dictionaries, named tuples
    and dataclasses, which are copied if something in them is cast. If nothing needs to be, the call
    is the plain one.
    """
    types: _Types | None = vars(model).get(_NAME)
    if types is None:
        return method(model, *args, **kwargs)
    outputs, path, name = types
    dtype = _dtype_of(model, path, name)
    if outputs != "float32":
        for x in (*args, *kwargs.values()):
            if not (isinstance(x, Tensor) and x.dtype == dtype or x is None):
                break
        else:  # the usual call
            return method(model, *args, **kwargs)
    given: list[torch.dtype] = []

    def to_own(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        given.append(t.dtype)
        return t.to(dtype)

    if _thread.model is model:  # a method of the network calls another
        return method(model, *args, **kwargs)
    args, kwargs = converted((args, kwargs), to_own)
    before, _thread.model = _thread.model, model
    try:
        result = method(model, *args, **kwargs)
    finally:
        _thread.model = before
    wanted = torch.float32 if outputs == "float32" else None
    if outputs == "input" and given and {*given} != {dtype}:
        wanted = given[0]
    if wanted is None:
        return result
    return converted(result, lambda t: t.to(wanted) if t.is_floating_point() else t)


def _dtype_of(model: nn.Module, path: tuple[str, ...], name: str) -> torch.dtype:
    """Of a parameter, or of the first one if that has gone."""
    module: Any = model
    try:
        for part in path:
            module = module._modules[part]
        dtype: torch.dtype = module._parameters[name].dtype
    except (KeyError, AttributeError):
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return dtype


def converted(
    value: Any, change: Callable[[Tensor], Any], seen: dict[int, Any] | None = None
) -> Any:
    """A structure with other tensors; itself if all of them stay the same.

    Args:
        change: called once for each tensor, also if that is in several places.
        seen: what became of its parts so far, by ``id``.
    """
    if torch.compiler.is_compiling():  # Dynamo knows pytree, but no copies of structures
        return pytree.tree_map_only(Tensor, change, value)
    if isinstance(value, Tensor):
        seen = {} if seen is None else seen
        if id(value) not in seen:
            seen[id(value)] = change(value)
        return seen[id(value)]
    parts = _parts(value)
    if parts is None:
        return value
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value  # while it is converted, as it may contain itself
    changed = {}
    for key, part in parts:
        if (made := converted(part, change, seen)) is not part:
            changed[key] = made
    if changed:
        seen[id(value)] = _replaced(value, changed)
    return seen[id(value)]


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a structure, each once."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    converted(value, keep)
    return found


def _parts(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """The parts of a structure and how they are told apart; None if it is none."""
    if value is None or isinstance(value, _OTHERS):
        return None
    if isinstance(value, MutableMapping):
        return iter([*value.items()])
    if isinstance(value, tuple | MutableSequence):
        return enumerate(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return iter([(name, getattr(value, name)) for name in names])
    return None


def _replaced(value: Any, changed: dict[Any, Any]) -> Any:
    """A copy of a structure with other parts."""
    if isinstance(value, tuple):
        parts = [changed.get(i, part) for i, part in enumerate(value)]
        return type(value)._make(parts) if hasattr(value, "_make") else type(value)(parts)
    made = copy.copy(value)
    for key, part in changed.items():
        if isinstance(value, MutableMapping | MutableSequence):
            made[key] = part
        else:
            object.__setattr__(made, key, part)  # of a frozen one, too
    return made
