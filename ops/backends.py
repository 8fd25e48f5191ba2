"""Backends of an op: modules with ``unavailable``, which says why not, and ``attend``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

__all__ = ["backend_named"]


def backend_named(name: str, backends: Mapping[str, ModuleType], *call: Any) -> ModuleType:
    """The backend of this name, if it supports the call.

    Args:
        name: the caller's argument ``backend``.
        backends: all of the op by name.
        call: the arguments of ``unavailable``.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the backend does not support the call; the message says why.
    """
    if name not in backends:
        raise ValueError(f"backend must be one of {', '.join(backends)} or None, got {name!r}")
    reason = backends[name].unavailable(*call)
    if reason is not None:
        raise NotImplementedError(f"backend {name!r} cannot do this call: {reason}")
    return backends[name]
