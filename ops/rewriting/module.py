"""Modules of any package whose calls are recorded, rewritten and replayed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ops.cpu.call.dispatch import is_plain_call
from ops.replay.module import Recorded
from ops.rewriting.graph import OperatorGraph, Program
from ops.rewriting.recorder import record
from ops.rewriting.rewrite import rewrite

__all__ = ["Rewritten"]

_METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")


class _Thread(threading.local):
    is_inside: bool = False  # a call that may be replayed as a whole
    is_recorded: bool = False  # such a call, now


_thread = _Thread()


@contextmanager
def _inside(*, is_recorded: bool) -> Iterator[None]:
    before = _thread.is_inside, _thread.is_recorded
    _thread.is_inside, _thread.is_recorded = True, is_recorded
    try:
        yield
    finally:
        _thread.is_inside, _thread.is_recorded = before


class Rewritten(Recorded):
    """Mixin, placed before the class of a network, that rewrites and replays its calls.

    A call must get one tensor; its other arguments and what it returns may be anything. The first
    call of a kind is recorded (:mod:`ops.rewriting.recorder`) and rewritten, the second captured,
    and later ones are replayed as described for :class:`ops.replay.module.Recorded`; all give the
    same bits. Where hardly any call repeats the shape of another, those of new shapes run the
    network as it was, and so do all other calls.
    """

    @classmethod
    def methods_of(cls, kind: type[nn.Module]) -> dict[str, Any]:
        return {name: _dispatched(getattr(kind, name)) for name in _METHODS if hasattr(kind, name)}

    def eagerly(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the network's own class; not used while it is recorded."""
        return method(self, *args, **kwargs)

    def compute(self, x: Tensor) -> Any:
        method: Any = type(self).stands_for.forward  # type: ignore[attr-defined]
        return method(self, x) if _thread.is_recorded else self.eagerly(method, x)

    def program(self, x: Tensor, call: Callable[[Tensor], Any]) -> Program:
        with _inside(is_recorded=True):
            graph = record(self, call, x)
        rewrite(graph)
        if self._records is not None:
            _share_layers(graph, self._records.made)
        return Program(graph)


def _share_layers(graph: OperatorGraph, made: dict[Hashable, list[Any]]) -> None:
    """Replace layers by equal ones of earlier programs, so that weights are packed once."""
    for operator in graph.operators:
        layer: Any = operator.function
        if not isinstance(layer, nn.Module):
            continue
        alike = made.setdefault((type(layer), str(layer)), [])
        for other in alike:
            if _equal(layer, other):
                operator.function = other
                break
        else:
            alike.append(layer)


def _equal(layer: nn.Module, other: nn.Module) -> bool:
    tensors, others = layer.state_dict(), other.state_dict()
    if tensors.keys() != others.keys():
        return False
    return all(
        t.data_ptr() == others[name].data_ptr() or torch.equal(t, others[name])
        for name, t in tensors.items()
    )


def _dispatched(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a network, replayed if possible."""

    @functools.wraps(method)
    def dispatched(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
        if _thread.is_recorded:
            return method(self, *args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if _thread.is_inside or len(places) != 1 or torch._C._len_torch_function_stack():
            return self.eagerly(method, *args, **kwargs)
        (place,) = places
        before, x, after = leaves[:place], leaves[place], leaves[place + 1 :]
        if not is_plain_call((x,)) or not all(map(_is_hashable, (*before, *after))):
            return self.eagerly(method, *args, **kwargs)

        def plain(x: Tensor) -> Any:
            now, named = pytree.tree_unflatten([*before, x, *after], structure)
            if _thread.is_recorded:
                return method(self, *now, **named)
            return self.eagerly(method, *now, **named)

        def call(x: Tensor) -> Any:
            with _inside(is_recorded=_thread.is_recorded):
                return plain(x)

        key = method.__name__, structure, (*before, *after)
        return self.recorded(x, call, key, otherwise=plain)

    return dispatched


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
