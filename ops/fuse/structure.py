"""What a call returns, taken apart into tensors and put together again for other tensors.

No object of one call's result is part of another's: containers are made anew, constants copied, and
what shares memory in one shares it in the other.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ops.replay.graph import NotCapturableError

__all__ = ["IMMUTABLE", "Structure", "is_constant", "take_apart"]

IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum),
)


def is_constant(value: Any) -> bool:
    """Whether a value can't change: a number, a string, a dtype, …, or a tuple of these."""
    if isinstance(value, tuple | frozenset):
        return all(map(is_constant, value))
    return isinstance(value, IMMUTABLE)


@dataclasses.dataclass
class _Part:
    """A tensor of the result.

    Attributes:
        kind: ``varying``; ``argument``; ``new``, of a constant that each call makes; or ``same``,
            of a tensor that is not the call's.
        tensor: of the latter two.
        argument: the number of the argument that it is.
        stride, offset, memory: of the plain call's tensor, with a number of its memory.
        stride: of the plain call's.
        memory: number of what it shares with other tensors.
    """

    kind: str
    tensor: Tensor | None
    stride: tuple[int, ...]
    offset: int
    memory: int
    argument: int = 0


class Structure:
    """How a result is put together.

    Attributes:
        outline: tells it from that of another result.
        parts: the distinct tensors.
    """

    def __init__(self, tree: Any, places: list[int | None], leaves: list[Any]) -> None:
        self._tree, self._places, self._leaves = tree, places, leaves
        self.parts: list[_Part] = []
        self.outline = repr((tree, places, [leaf for leaf in leaves if not _is_data(leaf)]))
        self._is_tensor = _is_leaf(tree) and len(places) == 1

    def note(
        self, t: Tensor, memory: int, value: Any, arguments: Sequence[Tensor], *, is_new: bool
    ) -> None:
        """Describe the next of the distinct tensors."""
        where = t.stride(), int(t.storage_offset())
        argument = next((i for i, x in enumerate(arguments) if x is t), None)
        if argument is not None:
            self.parts.append(_Part("argument", None, *where, memory, argument))
        elif value.constant is None:
            self.parts.append(_Part("varying", None, *where, memory))
        else:
            kept = t.detach().clone() if is_new else t
            self.parts.append(_Part("new" if is_new else "same", kept, *where, memory))

    @property
    def varying(self) -> list[_Part]:
        """The parts that a graph computes."""
        return [part for part in self.parts if part.kind == "varying"]

    def laid_out(self, places: Sequence[tuple[tuple[int, ...], int]]) -> Structure:
        """The same with other strides and offsets of the parts that vary."""
        following = iter(places)
        made = copy.copy(self)
        made.parts = []
        for part in self.parts:
            if part.kind == "varying":
                stride, offset = next(following)
                part = dataclasses.replace(part, stride=stride, offset=offset)
            made.parts.append(part)
        return made

    def __call__(self, computed: Sequence[Tensor], arguments: Sequence[Tensor]) -> Any:
        """The result with these tensors in place of those that vary, for these arguments."""
        if self._is_tensor and computed:
            return computed[0]
        following = iter(computed)
        tensors: list[Tensor] = []
        for part in self.parts:
            if part.kind == "varying":
                tensors.append(next(following))
            elif part.kind == "argument":
                tensors.append(arguments[part.argument])
            else:
                assert part.tensor is not None
                tensors.append(part.tensor if part.kind == "same" else part.tensor.clone())
        leaves = [
            leaf if place is None else tensors[place]
            for place, leaf in zip(self._places, self._leaves, strict=True)
        ]
        return _unflatten(self._tree, iter(leaves))


def take_apart(result: Any) -> tuple[Structure, list[Tensor]]:
    """The structure of a result, and its distinct tensors.

    Raises:
        NotCapturableError: it holds an object that can't be made anew.
    """
    leaves: list[Any] = []
    tree = _flatten(result, leaves, set())
    distinct: dict[int, int] = {}
    tensors: list[Tensor] = []
    places: list[int | None] = []
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            places.append(None)
            continue
        if id(leaf) not in distinct:
            distinct[id(leaf)] = len(tensors)
            tensors.append(leaf)
        places.append(distinct[id(leaf)])
        leaves[index] = None
    return Structure(tree, places, leaves), tensors


@dataclasses.dataclass
class _Tree:
    """Several parts: of a dataclass by their names, else of a container that pytree knows."""

    spec: Any
    parts: list[Any]
    names: tuple[str, ...] = ()


class _Leaf:
    """A part that is no container."""

    def __repr__(self) -> str:
        return "_"


_LEAF = _Leaf()


def _is_leaf(tree: Any) -> bool:
    return tree is _LEAF


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _flatten(value: Any, leaves: list[Any], seen: set[int]) -> Any:
    """The tree of a value, whose leaves are added; containers in several places are refused."""
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    if len(parts) == 1 and parts[0] is value or is_constant(value) and type(value) is not tuple:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _flatten_dataclass(value, leaves, seen)
        if not isinstance(value, Tensor) and not is_constant(value):
            raise NotCapturableError(f"the result holds a {type(value).__name__}")
        leaves.append(value)
        return _LEAF
    if id(value) in seen:
        raise NotCapturableError(f"the result holds a {type(value).__name__} twice")
    seen.add(id(value))
    return _Tree(spec, [_flatten(part, leaves, seen) for part in parts])


def _flatten_dataclass(value: Any, leaves: list[Any], seen: set[int]) -> _Tree:
    names = tuple(vars(value)) if hasattr(value, "__dict__") else ()
    if not names or not {f.name for f in dataclasses.fields(value)} >= {*names}:
        raise NotCapturableError(f"the result holds a {type(value).__name__} with more than fields")
    empty = copy.copy(value)
    for name in names:
        object.__setattr__(empty, name, None)
    return _Tree(empty, [_flatten(getattr(value, name), leaves, seen) for name in names], names)


def _unflatten(tree: Any, leaves: Any) -> Any:
    if tree is _LEAF:
        return next(leaves)
    parts = [_unflatten(part, leaves) for part in tree.parts]
    if not tree.names:
        return pytree.tree_unflatten(parts, tree.spec)
    made = copy.copy(tree.spec)
    for name, part in zip(tree.names, parts, strict=True):
        object.__setattr__(made, name, part)
    return made
