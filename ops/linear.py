"""Linear layers on the CPU for inference, with what stands around them in one pass.

The kernel (``ops/native/linear.cpp``) is for a thread or a few, where oneDNN spends much of a small
batch on waiting for weights: it fetches them ahead. Sums are of float32; on CPUs that do not
multiply bfloat16, what is in it becomes float32 on the way. There are no gradients.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ops import native
from ops.native.eager import is_plain_call, require_dtype
from ops.native.linear_plan import (
    COMBINATIONS,
    Plan,
    Problem,
    Tensors,
    output_shape,
    plan_layer,
)

__all__ = [
    "COMBINATIONS",
    "pack_weight",
    "packed_linear",
    "packed_linear_energy",
    "prepare",
    "unsupported",
]

_KERNEL = "linear"
# Tensors in bytes, which takes less time than to fill in the structure.
TENSORS = struct.Struct(f"={len(Tensors._fields_)}Q")


def unsupported(
    device: torch.device, dtype: torch.dtype, *, with_bfloat16: bool = False
) -> str | None:
    """``None`` if the kernel takes such tensors, else the reason in words.

    The first call on a machine compiles the kernel, which takes some seconds.

    Args:
        with_bfloat16: whether bfloat16 will do beside float32. Without AMX or AVX512-BF16 the
            kernel makes it float32 on the way; where torch need not, that is no gain.
    """
    if device.type != "cpu":
        return f"the kernel runs on the CPU, the tensors are on {device.type}"
    if dtype != torch.float32 and not (with_bfloat16 and dtype == torch.bfloat16):
        return f"the kernel takes float32, not {dtype}"
    library = native.load(_KERNEL)
    torch_does = dtype == torch.bfloat16 and native.multiplies(dtype)
    if library is not None and torch_does and not library.linear_multiplies_bfloat16():
        return "torch multiplies bfloat16 on this CPU, the kernel would multiply float32"
    return native.unavailable_reason(_KERNEL)


def pack_weight(weight: Tensor) -> Tensor:
    """The weight of a linear layer in the kernel's order.

    Args:
        weight: (out_features, in_features), float32 or bfloat16, on the CPU.

    Returns:
        A flat tensor of the same dtype, for the CPU of this process only.

    Raises:
        ValueError: not a matrix.
        RuntimeError: the kernel is not available here.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (out_features, in_features), got {tuple(weight.shape)}")
    library = library_or_raise(weight)
    library.linear_packed_size.restype = ctypes.c_int64
    half = weight.dtype == torch.bfloat16
    shape = [ctypes.c_int64(n) for n in weight.shape]
    source = weight.detach().contiguous()
    packed = source.new_empty(library.linear_packed_size(*shape, half))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (source, packed)]
    library.linear_pack(pointers[0], *shape, half, pointers[1])
    return packed


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    other: Tensor | None = None,
    combination: str = "none",
    scale: Tensor | None = None,
    other_scale: Tensor | None = None,
) -> Tensor:
    """``activation((x * scale) @ weight.T + bias)``, combined with ``other``. No gradients.

    Args:
        x: (B, ..., in_features), float32 or bfloat16 as the weight. Rows that lie equally far apart
            are not copied.
        weight: see :func:`pack_weight`.
        bias: (out_features,) float32; its length tells that of the result.
        activation: one of :data:`ops.depthwise.ACTIVATIONS`; GELU is the exact one.
        other: (B, ..., out_features), in the dtype of ``x``.
        combination: one of :data:`COMBINATIONS`: what comes out ``+ other``, ``* other`` or
            ``+ other * other_scale``.
        scale: (B, in_features) float32, by which the inputs are multiplied.
        other_scale: (out_features,) float32, of ``add_scaled`` and of it alone.

    Returns:
        (B, ..., out_features), contiguous; sums are of float32.

    Raises:
        ValueError: shapes or dtypes that do not go together, an unknown activation or combination.
        RuntimeError: the kernel is not available here (:func:`unsupported` tells beforehand).
    """
    tensors = (x, weight, bias, other, scale, other_scale)
    forward = _linear if is_plain_call(tensors) else _dispatched
    return forward(x, weight, bias, activation, other, combination, scale, other_scale, False)[0]


def packed_linear_energy(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`packed_linear`, and the sums of squares of the results, image by image.

    Returns:
        (B, ..., out_features), contiguous, and (B, out_features) float32.

    Raises:
        ValueError, RuntimeError: see :func:`packed_linear`.
    """
    forward = _linear if is_plain_call((x, weight, bias, scale)) else _dispatched
    out, energy = forward(x, weight, bias, activation, None, "none", scale, None, True)
    return out, energy


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    other: Tensor | None = None,
    combination: str = "none",
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """What does as :func:`packed_linear` for such ``x`` and ``other`` in the least time.

    They have the same shapes, strides and dtypes, :func:`ops.native.eager.is_plain_call` holds for
    them, and the number of threads is the same. A small layer takes torch and Python longer to call
    than to compute.

    Args:
        x, weight, bias, activation, other, combination: as for :func:`packed_linear`, but not
            ``add_scaled``.

    Returns:
        A function of ``x`` and ``other``; None where they have to be copied first, or are empty.

    Raises:
        ValueError, RuntimeError: see :func:`packed_linear`.
    """
    plan = _plan((x, weight, bias, other, None, None), activation, combination, energy=False)
    shape = plan.out_shape
    if plan.copies_input or (other is not None and plan.copies_other) or 0 in shape:
        return None
    forward, problem = library_or_raise(x).linear_forward, ctypes.byref(plan.problem)

    def run(x: Tensor, other: Tensor | None) -> Tensor:
        out = x.new_empty(shape)
        beside = 0 if other is None else other.data_ptr()
        tensors = TENSORS.pack(
            x.data_ptr(), weight.data_ptr(), bias.data_ptr(), beside, 0, out.data_ptr(), 0, 0
        )
        if forward(problem, tensors):
            raise MemoryError("no memory for the scratch of a linear layer")
        return out

    return run


_library = torch.library.Library("vision_backbones", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor bias, str activation, Tensor? other, "
    "str combination, Tensor? scale, Tensor? other_scale, bool energy) -> Tensor[]"
)
_dispatched = torch.ops.vision_backbones.packed_linear.default


@torch.library.impl(_library, "packed_linear", "CPU")
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    other: Tensor | None,
    combination: str,
    scale: Tensor | None,
    other_scale: Tensor | None,
    energy: bool,
) -> list[Tensor]:
    plan = _plan((x, weight, bias, other, scale, other_scale), activation, combination, energy)
    outs = [x.new_empty(plan.out_shape)]
    if energy:
        outs.append(bias.new_empty(x.shape[0], bias.shape[0]))
    x = x.contiguous() if plan.copies_input else x
    if other is not None and plan.copies_other:
        other = other.contiguous()
    _run(plan.problem, x, weight, bias, other, scale, other_scale, *outs)
    return outs


@torch.library.register_fake("vision_backbones::packed_linear", lib=_library)
def _empty_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    other: Tensor | None,
    combination: str,
    scale: Tensor | None,
    other_scale: Tensor | None,
    energy: bool,
) -> list[Tensor]:
    _check_other_scale(bias, combination, other_scale)
    shape = output_shape(
        x.shape,
        (x.dtype, weight.dtype, weight.numel(), bias.shape, activation, combination),
        None if other is None else other.shape,
        None if scale is None else scale.shape,
    )
    outs = [x.new_empty(shape)]
    return [*outs, bias.new_empty(x.shape[0], bias.shape[0])] if energy else outs


def _plan(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    combination: str,
    energy: bool,
) -> Plan:
    x, weight, bias, other, scale, other_scale = tensors
    require_dtype(torch.float32, bias=bias, other_scale=other_scale)
    require_dtype(x.dtype, other=other)
    _check_other_scale(bias, combination, other_scale)
    return plan_layer(
        x.shape,
        x.stride(),
        (x.dtype, weight.dtype, weight.numel(), bias.shape, activation, combination),
        None if other is None else (other.shape, other.stride()),
        None if scale is None else scale.shape,
        energy,
        torch.get_num_threads(),
    )


def _check_other_scale(bias: Tensor, combination: str, other_scale: Tensor | None) -> None:
    shape = None if other_scale is None else tuple(other_scale.shape)
    wanted = tuple(bias.shape) if combination == "add_scaled" else None
    if shape != wanted:
        raise ValueError(f"other_scale must be {wanted} with {combination!r}, got {shape}")


def library_or_raise(x: Tensor) -> ctypes.CDLL:
    reason = unsupported(x.device, x.dtype, with_bfloat16=True)
    library = native.load(_KERNEL)
    if library is None or reason is not None:
        raise RuntimeError(f"the kernel of linear layers is not available: {reason}")
    return library


def _run(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    other: Tensor | None,
    scale: Tensor | None,
    other_scale: Tensor | None,
    out: Tensor,
    energy: Tensor | None = None,
) -> None:
    """Into ``out`` and, if there is one, ``energy``.

    Raises:
        RuntimeError: the kernel is not available here.
    """
    library = library_or_raise(x)
    if out.numel() == 0:
        if energy is not None:
            energy.zero_()
        return
    if scale is not None:
        scale = scale.float().contiguous()
    if other_scale is not None:
        other_scale = other_scale.contiguous()
    tensors = Tensors(
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        None if other is None else other.data_ptr(),
        None if scale is None else scale.data_ptr(),
        out.data_ptr(),
        None if energy is None else energy.data_ptr(),
        None if other_scale is None else other_scale.data_ptr(),
    )
    if library.linear_forward(ctypes.byref(problem), ctypes.byref(tensors)):
        raise MemoryError("no memory for the scratch of a linear layer")
