"""Modules of any package whose calls are recorded, rewritten and replayed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ops.cpu.dispatch import is_plain_call
from ops.replay.module import Recorded
from ops.rewriting.program import Program
from ops.rewriting.recorder import record
from ops.rewriting.rewrite import rewrite

__all__ = ["Rewritten"]

_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")


class _Thread(threading.local):
    is_inside: bool = False  # a call that may be recorded as a whole


_thread = _Thread()


class Rewritten(Recorded):
    """Mixin, placed before the class of a network, that rewrites and replays its calls.

    A call must get one tensor; its other arguments and what it returns may be anything. The first
    call of a kind runs eagerly, the second is recorded (:mod:`ops.rewriting.recorder`), rewritten
    and captured, and later ones are replayed as described for :class:`ops.replay.module.Recorded`.
    All other calls run the network as it was.
    """

    known_packages: ClassVar = ("",)  # all
    most_inputs: ClassVar = 4  # each has packed weights of its own

    @classmethod
    def methods_of(cls, kind: type[nn.Module]) -> dict[str, Any]:
        return {name: _dispatched(getattr(kind, name)) for name in _METHODS if hasattr(kind, name)}

    def compute(self, x: Tensor) -> Any:
        """The network's own ``forward``."""
        return type(self).stands_for.forward(self, x)  # type: ignore[attr-defined]

    def program(self, x: Tensor, call: Callable[[Tensor], Any]) -> Program:
        graph = record(self, call, x)
        rewrite(graph)
        program = Program(graph)
        program(x)  # packs the weights
        return program


def _dispatched(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a network that is replayed where it can be."""

    @functools.wraps(method)
    def dispatched(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if _thread.is_inside or len(places) != 1 or torch._C._len_torch_function_stack():
            return method(self, *args, **kwargs)
        (place,) = places
        before, x, after = leaves[:place], leaves[place], leaves[place + 1 :]
        if not is_plain_call((x,)) or not all(map(_is_hashable, (*before, *after))):
            return method(self, *args, **kwargs)

        def plain(x: Tensor) -> Any:
            now, named = pytree.tree_unflatten([*before, x, *after], structure)
            return method(self, *now, **named)

        def call(x: Tensor) -> Any:
            _thread.is_inside = True
            try:
                return plain(x)
            finally:
                _thread.is_inside = False

        key = method.__name__, structure, (*before, *after)
        return self.recorded(x, call, key, otherwise=plain)

    return dispatched


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
