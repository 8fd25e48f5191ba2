"""Backends of an op: a module for each of its implementations.

An op checks its arguments and calls the first backend in order of preference that supports the
call, or the one that the caller names. A backend that refuses calls has ``unavailable(*call)``:
None if it supports the call, else the reason, for the message of an explicit ``backend=``. It is
cheap and depends on shapes, dtypes and devices, never on values. Backends may assume that no tensor
is empty; they must handle arbitrary strides and ``None`` for absent tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch


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
    backend = backends[name]
    reason = backend.unavailable(*call) if hasattr(backend, "unavailable") else None
    if reason is not None:
        raise NotImplementedError(f"backend {name!r} cannot do this call: {reason}")
    return backend


def backend_of_scan(name: str | None, backends: Mapping[str, ModuleType], *call: Any) -> ModuleType:
    """The backend of this name, or the first in order of preference that supports the call.

    Args:
        name: as for :func:`backend_named`, or None.
        backends: ``triton``, ``cpu``, and ``chunked``, which supports every call, among them.
        call: the arguments of ``unavailable``, the sequence first.
    """
    if name is not None:
        return backend_named(name, backends, *call)
    x = call[0]
    if torch.compiler.is_exporting():
        return backends["chunked"]
    kernels = {"cuda": "triton", "cpu": "cpu"}.get(x.device.type)
    if kernels is not None and backends[kernels].unavailable(*call) is None:
        return backends[kernels]
    kept = x.dtype in (torch.float32, torch.bfloat16) and not torch.is_grad_enabled()
    if x.device.type == "meta" and kept:
        return backends["cpu"]  # only its operators are traceable by shape and have FLOP counts
    return backends["chunked"]
