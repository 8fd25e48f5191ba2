"""Whether a kernel call may bypass torch's dispatcher, and checks of dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _key_set(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_PLAIN_TENSOR = _key_set("CPU", "AutogradCPU", "AutocastCPU", "ADInplaceOrView")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_PLAIN_MODE = _key_set("BackendSelect", "ADInplaceOrView")
_WATCHED_MODE = _key_set("BackendSelect", "ADInplaceOrView", "Python", "PythonTLSSnapshot")
_REPLACING_MODES = [
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "FUNCTIONAL", "PROXY")
]
_dispatch_keys = torch._C._dispatch_keys


def is_plain_call(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would only call the kernel for these CPU tensors.

    The round trip through the dispatcher and back into Python takes as long as some kernels on a
    small map. The profiler and other modes need it, as does everything for which
    :func:`kernels_apply` is false.
    """
    if _is_transformed() or torch.autograd._profiler_enabled():
        return False
    modes: int = torch._C._dispatch_tls_local_include_set().raw_repr()
    return modes | _PLAIN_MODE == _PLAIN_MODE and _are_plain(tensors)


def kernels_apply(tensors: Sequence[Tensor | None]) -> bool:
    """Whether kernels may replace torch's functions on these CPU tensors.

    Observers such as the profiler and modes that count see kernels as operators. Compilers,
    tracers, subclasses, autocast, functorch's transforms and forward-mode differentiation need
    torch's own functions. So does backward differentiation, which is not checked here.
    """
    if _is_transformed():
        return False
    modes: int = torch._C._dispatch_tls_local_include_set().raw_repr()
    plain = modes | _PLAIN_MODE == _PLAIN_MODE or _only_watch(modes)
    return plain and _are_plain(tensors)


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd has to record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_transformed() -> bool:
    """Whether compilation, forward-mode AD or autocast is active, which modes don't show."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def _only_watch(modes: int) -> bool:
    """Whether the modes are Python modes that only observe and replace nothing."""
    get = torch._C._get_dispatch_mode
    return modes | _WATCHED_MODE == _WATCHED_MODE and not any(map(get, _REPLACING_MODES))


def _are_plain(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN_TYPES:
            return False
        if _dispatch_keys(t).raw_repr() | _PLAIN_TENSOR != _PLAIN_TENSOR:
            return False
    return True


def require_values(**tensors: Tensor) -> None:
    """Check that tensors are not empty, for kernels that need a value of each row."""
    for name, t in tensors.items():
        if not t.numel():
            raise ValueError(f"{name} must not be empty, got {tuple(t.shape)}")


def require_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Check the dtypes of tensors, since a kernel receives only addresses."""
    for name, t in tensors.items():
        if t is not None and t.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {t.dtype}")
