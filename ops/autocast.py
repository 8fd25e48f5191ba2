"""Disabling of autocast, for functions that need precise sums."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocasts", "without_autocast"]


def _available(device_type: str) -> bool:
    # The compiler of torch 2.8 cannot ask, but every device that it compiles for has autocast.
    compiles = torch.compiler.is_compiling() and device_type != "meta"
    return compiles or bool(torch.amp.is_autocast_available(device_type))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; devices may be without it, as meta."""
    return _available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast on ``device``, if it supports autocast (meta does not)."""
    if _available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
