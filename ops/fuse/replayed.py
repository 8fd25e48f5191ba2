"""Networks whose calls are recorded and replayed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ops.fuse.calls import Calls, Door, is_part

__all__ = ["Replayed", "replayed_class"]

_METHODS = (
    *("forward", "forward_features", "forward_head"),
    *("forward_intermediates", "get_intermediate_layers"),
)


class Replayed(nn.Module):
    """Mixin, placed before the class of a network, whose calls are recorded and replayed.

    Attributes:
        is_recorded: whether they are; otherwise they run as :meth:`run` does.
    """

    is_recorded = True
    _calls: Calls | None = None

    def __init_subclass__(cls, **_: Any) -> None:
        """Do nothing: the classes that are made of others ask for none of their arguments."""

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the network's own class, as users do, be it recorded or not."""
        return method(self, *args, **kwargs)

    def forget(self) -> None:
        """Drop all recordings."""
        self._calls = None

    @property
    def doors(self) -> list[Door]:
        """The door of each kind of call that occurred."""
        return [] if self._calls is None else self._calls.doors()

    @property
    def is_replayed(self) -> bool:
        """Whether there is a kind of call that is replayed."""
        return any(door.name == "recorded" for door in self.doors)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_calls": None}


_classes: dict[tuple[type[nn.Module], type[Replayed]], type[nn.Module]] = {}


def replayed_class(kind: type[nn.Module], mixin: type[Replayed]) -> type[nn.Module]:
    """A picklable subclass of ``mixin`` and ``kind`` under the name of ``kind``."""
    made = _classes.get((kind, mixin))
    if made is None:
        members = {
            **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
            **{n: _dispatched(kind, n) for n in _METHODS if hasattr(kind, n)},
            "stands_for": kind,  # see ops.inference.layers
            "__reduce_ex__": lambda self, _: (_restore, (kind, mixin), self.__getstate__()),
        }
        made = _classes[kind, mixin] = type(kind.__name__, (mixin, kind), members)
    return made


def _restore(kind: type[nn.Module], mixin: type[Replayed]) -> nn.Module:
    made = replayed_class(kind, mixin)
    return made.__new__(made)


def _dispatched(kind: type[nn.Module], name: str) -> Callable[..., Any]:
    """A method of a network, replayed if possible."""

    @functools.wraps(getattr(kind, name))
    def dispatched(self: Replayed, *args: Any, **kwargs: Any) -> Any:
        method = getattr(kind, name)
        if is_part():
            return method(self, *args, **kwargs)
        if torch.compiler.is_compiling() or not self.is_recorded:
            return self.run(method, *args, **kwargs)
        if self._calls is None:
            self._calls = Calls(_dynamo)
        return self._calls(self, method, args, kwargs)

    return dispatched


def _dynamo() -> Any:
    from ops.fuse import dynamo  # which takes a second to import

    return dynamo
