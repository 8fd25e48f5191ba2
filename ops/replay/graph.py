"""The graph of a captured module: kernel and torch calls, and their buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ops.fuse.nested import leaves


class NotCapturableError(Exception):
    """A module cannot be captured and runs eagerly; the message says why."""


class Place(NamedTuple):
    """A byte offset into a buffer."""

    buffer: int
    offset: int


class View(NamedTuple):
    """A tensor in a buffer; the offset is in elements, not bytes."""

    buffer: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Block(NamedTuple):
    """Bytes passed to a kernel by address, and the places whose addresses they contain."""

    data: bytes
    places: tuple[tuple[int, Place], ...]


@dataclass
class Buffer:
    """Memory of a tensor: its layout, and its first and end address during the capture."""

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
    """A kernel call: the address of its function, and its arguments."""

    function: int
    arguments: list[int | Place | Block]
    results: ClassVar[dict[int, int]] = {}  # it allocates none

    def places(self) -> Iterator[Place]:
        """The places that the kernel reads or writes."""
        for argument in self.arguments:
            if isinstance(argument, Block):
                yield from (place for _, place in argument.places)
            elif isinstance(argument, Place):
                yield argument


@dataclass
class TorchCall:
    """A call of a torch function, with views in place of the non-constant tensor arguments.

    ``results`` maps the position of a result to the buffer that the call allocates for it.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    results: dict[int, int] = field(default_factory=dict)

    def places(self) -> list[View]:
        """The tensors among the arguments that are not constants."""
        return views_in((self.args, self.kwargs))


@dataclass
class Graph:
    """A captured sequence of calls, valid for inputs of the same shape, strides and dtype.

    Attributes:
        calls: in execution order.
        buffers: the memory that the calls use; the first ones hold the inputs.
        constants: other memory that the calls read, which must be kept alive.
        result: what is returned, with views in place of tensors that are not constants.
        inputs: the number of input tensors.
    """

    calls: list[KernelCall | TorchCall]
    buffers: list[Buffer]
    constants: list[Any]
    result: Any
    inputs: int = 1

    @property
    def results(self) -> list[View]:
        """The views among the results."""
        return views_in(self.result)


def is_view(value: Any) -> bool:
    """Whether a value is a view, which is a leaf and no tuple."""
    return isinstance(value, View)


def views_in(value: Any) -> list[View]:
    """The views in nested sequences and dictionaries."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, View)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested sequences and dictionaries."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
