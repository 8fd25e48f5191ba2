"""The graph of a captured piece of a network: calls of kernels and of torch, and their buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Block",
    "Buffer",
    "Graph",
    "KernelCall",
    "NotCapturableError",
    "Place",
    "TorchCall",
    "View",
    "tensors_in",
]


class NotCapturableError(Exception):
    """Why a piece of a network cannot be captured, and runs eagerly."""


class Place(NamedTuple):
    """Bytes from where a buffer begins."""

    buffer: int
    offset: int


class View(NamedTuple):
    """A tensor in a buffer; the offset is in elements."""

    buffer: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Block(NamedTuple):
    """Bytes that a kernel is given the address of, and the places whose addresses are in them."""

    data: bytes
    places: tuple[tuple[int, Place], ...]


@dataclass
class Buffer:
    """Memory that came into being, for a tensor: its layout, from which address, and to which."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass
class KernelCall:
    """A kernel's function, by its address, its arguments, and the operator that it belongs to."""

    function: int
    arguments: list[int | Place | Block]
    name: str = "kernel"

    def places(self) -> Iterator[Place]:
        """What it works on."""
        for argument in self.arguments:
            if isinstance(argument, Block):
                yield from (place for _, place in argument.places)
            elif isinstance(argument, Place):
                yield argument


@dataclass
class TorchCall:
    """A function of torch, with views where tensors that are not constant stand in the arguments.

    ``results`` are the buffers that it makes, by their index among its results.
    """

    name: str
    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    results: dict[int, int] = field(default_factory=dict)

    def views(self) -> Iterator[View]:
        """What it works on, its results aside."""
        return (leaf for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, View))

    def constants(self) -> Iterator[Tensor]:
        """What it reads that was there before."""
        return tensors_in((self.args, self.kwargs))


@dataclass
class Graph:
    """What was captured, for other inputs of the same shape, strides and dtype.

    Attributes:
        calls: in their order.
        buffers: the memory that they work on; the first is the input's.
        constants: what else they read; it must be kept.
        result: where it lies.
    """

    calls: list[KernelCall | TorchCall]
    buffers: list[Buffer]
    constants: list[Any]
    result: View

    def __str__(self) -> str:
        """A line a call, with the buffers that it works on, then the buffers."""
        lines = []
        for call in self.calls:
            if isinstance(call, KernelCall):
                used = [_named(place.buffer, place.offset) for place in call.places()]
                lines.append(f"kernel  {call.name}({', '.join(used)})")
            else:
                used = [_named(view.buffer, view.offset) for view in call.views()]
                made = ", ".join(f"%{index}" for index in call.results.values())
                text = f"{call.name}({', '.join(used)})"
                lines.append(f"torch   {made} = {text}" if made else f"torch   {text}")
        lines.append(f"return  {_named(self.result.buffer, self.result.offset)}")
        for index, buffer in enumerate(self.buffers):
            dtype = str(buffer.dtype).removeprefix("torch.")
            size = "×".join(map(str, buffer.size))
            lines.append(f"%{index}: {size} {dtype}, {buffer.nbytes} bytes")
        return "\n".join(lines)


def _named(buffer: int, offset: int) -> str:
    return f"%{buffer}+{offset}" if offset else f"%{buffer}"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, View) or not isinstance(value, tuple | list | dict):
        yield value
        return
    for v in value.values() if isinstance(value, dict) else value:
        yield from _leaves(v)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in nested sequences and dictionaries."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))
