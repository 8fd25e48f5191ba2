"""Whether a native kernel takes a call, and whether it may go past torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.native.build import unavailable_reason
from ops.native.recorder import recording

__all__ = ["Repeats", "is_plain_call", "require_dtype", "unsupported_tensors"]


def _key_set(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_PLAIN_TENSOR = _key_set("CPU", "AutogradCPU", "AutocastCPU", "ADInplaceOrView")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_PLAIN_MODE = _key_set("BackendSelect", "ADInplaceOrView")
_dispatch_keys = torch._C._dispatch_keys


def is_plain_call(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would do nothing with these CPU tensors but call the kernel.

    The way through it and back into Python takes as long as some kernels do on a small map.
    Compilation, subclasses, modes, functorch's transforms, tracers and the profiler need it.
    """
    if torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
        return False
    modes: int = torch._C._dispatch_tls_local_include_set().raw_repr()
    if modes | _PLAIN_MODE != _PLAIN_MODE:
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN_TYPES:
            return False
        if _dispatch_keys(t).raw_repr() | _PLAIN_TENSOR != _PLAIN_TENSOR:
            return False
    return True


def require_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Refuse tensors that a kernel, which only sees where they begin, would misread.

    Raises:
        ValueError: one of another dtype, by its name.
    """
    for name, t in tensors.items():
        if t is not None and t.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {t.dtype}")


class Repeats:
    """Functions for calls that repeat, each made for shapes, strides and dtypes of its tensors.

    To plan the call of a small layer takes longer than to compute it.

    Args:
        prepare: from tensors and options to a function for such tensors and so many threads, or to
            None where there is none.
    """

    _MOST = 64  # sizes of maps that are remembered

    def __init__(self, prepare: Callable[..., Callable[..., Any] | None]) -> None:
        self._prepare = prepare
        self._functions: dict[Hashable, Callable[..., Any] | None] = {}

    def find(
        self, tensors: Sequence[Tensor | None], *options: Hashable
    ) -> Callable[..., Any] | None:
        """The function for such tensors; None also where :func:`is_plain_call` does not hold.

        Raises:
            ValueError, RuntimeError: those of ``prepare``, which runs on the first such call.
        """
        if not is_plain_call(tensors):
            return None
        if recording() is not None:  # known functions would call kernels unseen
            return self._prepare(*tensors, *options)
        layouts = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        call = (*layouts, options, torch.get_num_threads())
        try:
            return self._functions[call]
        except KeyError:
            if len(self._functions) >= self._MOST:
                self._functions.clear()
            function = self._functions[call] = self._prepare(*tensors, *options)
            return function


def unsupported_tensors(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if a kernel of the CPU for float32 and bfloat16 takes such tensors, else why not."""
    if device.type != "cpu":
        return f"the kernel runs on the CPU, the tensors are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the kernel takes float32 and bfloat16, not {dtype}"
    return unavailable_reason(kernel)
