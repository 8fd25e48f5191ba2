"""Maps to planes and back on the CPU for inference, with the norm before and the shortcut after.

Some layers read a map of planes, (B, C, H, W), where all others have channels last. The kernel
(``ops/native/planes.cpp``) turns tiles of it over in registers; torch takes several passes, slow
ones where two layouts meet. It takes float32 or bfloat16; there are no gradients.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ops import native
from ops.native.eager import is_plain_call, require_dtype, unsupported_tensors
from ops.native.threads import VALUES, threads_for

__all__ = ["join_planes", "split_planes", "unsupported"]

_KERNEL = "planes"


class _Problem(ctypes.Structure):
    """``planes::Problem`` of ops/native/planes.h."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "channels", "pixels", "bfloat16", "threads")
    ]


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.
    """
    return unsupported_tensors(_KERNEL, device, dtype)


def split_planes(x: Tensor, affine: Tensor) -> Tensor:
    """``x * scale + shift``, channel by channel, as planes. No gradients.

    Args:
        x: (B, C, H, W), float32 or bfloat16; copied where its channels are not last.
        affine: (2, C) float32, the scales and the shifts.

    Returns:
        (B, C, H, W), contiguous, in the dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    return (_split if is_plain_call((x, affine)) else _dispatched_split)(x, affine)


def join_planes(planes: Tensor, x: Tensor) -> Tensor:
    """``planes + x`` with channels last. No gradients.

    Args:
        planes: (B, C, H, W), float32 or bfloat16; copied where they are not contiguous.
        x: the same of channels last; copied where they are not.

    Returns:
        (B, C, H, W), channels-last, in the dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    return (_join if is_plain_call((planes, x)) else _dispatched_join)(planes, x)


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define("split_planes(Tensor x, Tensor affine) -> Tensor")
_library.define("join_planes(Tensor planes, Tensor x) -> Tensor")
_dispatched_split = torch.ops.vision_backbones.split_planes.default
_dispatched_join = torch.ops.vision_backbones.join_planes.default


@torch.library.impl(_library, "split_planes", "CPU")
def _split(x: Tensor, affine: Tensor) -> Tensor:
    out = _empty_planes(x, affine)
    x = x.contiguous(memory_format=torch.channels_last)
    _run("planes_split", x, x, affine.contiguous(), out)
    return out


@torch.library.register_fake("vision_backbones::split_planes", lib=_library)
def _empty_planes(x: Tensor, affine: Tensor) -> Tensor:
    _check_map(x)
    require_dtype(torch.float32, affine=affine)
    if affine.shape != (2, x.shape[1]):
        raise ValueError(f"affine must be (2, {x.shape[1]}), got {tuple(affine.shape)}")
    return x.new_empty(x.shape)


@torch.library.impl(_library, "join_planes", "CPU")
def _join(planes: Tensor, x: Tensor) -> Tensor:
    out = _empty_map(planes, x)
    x = x.contiguous(memory_format=torch.channels_last)
    _run("planes_join", x, planes.contiguous(), x, out)
    return out


@torch.library.register_fake("vision_backbones::join_planes", lib=_library)
def _empty_map(planes: Tensor, x: Tensor) -> Tensor:
    _check_map(x)
    require_dtype(x.dtype, planes=planes)
    if planes.shape != x.shape:
        raise ValueError(f"planes must be {tuple(x.shape)}, got {tuple(planes.shape)}")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check_map(x: Tensor) -> None:
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"x must be (B, C, H, W) of float32 or bfloat16, got {tuple(x.shape)} of {x.dtype}"
        )


def _run(name: str, x: Tensor, first: Tensor, second: Tensor, out: Tensor) -> None:
    library, reason = native.load(_KERNEL), unsupported(x.device, x.dtype)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of planes is not available: {reason}")
    if out.numel() == 0:
        return
    threads = threads_for(x.numel(), VALUES, torch.get_num_threads())
    problem = _problem(tuple(x.shape), x.dtype == torch.bfloat16, threads)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (first, second, out)]
    if getattr(library, name)(ctypes.byref(problem), *pointers):
        raise MemoryError("no memory to turn a map over")


@functools.lru_cache(maxsize=256)
def _problem(shape: tuple[int, ...], bfloat16: bool, threads: int) -> _Problem:
    batch, channels, height, width = shape
    return _Problem(batch, channels, height * width, bfloat16, threads)
