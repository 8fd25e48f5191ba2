"""Disabling autocast in functions that need full-precision sums."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def _available(device_type: str) -> bool:
    # torch 2.8 cannot compile this query, but every device that it compiles for supports autocast.
    compiles = torch.compiler.is_compiling() and device_type != "meta"
    return compiles or bool(torch.amp.is_autocast_available(device_type))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled on ``device``; False if unsupported, as on meta."""
    return _available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast on ``device`` if it is enabled or, in a graph, may be enabled later."""
    may = _available(device.type) if torch.compiler.is_compiling() else autocasts(device)
    return torch.autocast(device.type, enabled=False) if may else nullcontext()
