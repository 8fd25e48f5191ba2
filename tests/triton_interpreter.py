"""Triton's interpreter without the overhead that takes nine tenths of its time in small tests."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.language import semantic


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """In interpreter mode, patch triton.language only once and compute nothing about types twice.

    By default, the interpreter patches triton.language for every call of a device function, with
    the same effect each time, checks every integer operation for overflow, and derives the types of
    every operation anew, which takes longer than the operation.
    """
    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    patch_lang, patched, known = interpreter._patch_lang, set(), set()

    def patch_once(function):
        if function not in known:
            known.add(function)
            names = {n for n, m in function.__globals__.items() if m is tl or m is tl.core}
            if frozenset(names) not in patched:
                patch_lang(function)
                patched.add(frozenset(names))
        return types.SimpleNamespace(restore=lambda: None)

    def patch_member(package, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)  # without checks that it gets _semantic

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(package, name, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_patch_attr", patch_member)
        for kind in (tl.block_type, tl.pointer_type):
            patch.setattr(kind, "__hash__", tl.dtype.__hash__)
        patch.setattr(interpreter, "_get_np_dtype", functools.cache(interpreter._get_np_dtype))
        patch.setattr(tl.tensor, "__init__", _init_tensor)
        patch.setattr(tl.block_type, "__init__", _init_block_type)
        check_types = semantic.TritonSemantic.binary_op_type_checking_impl
        patch.setattr(
            semantic.TritonSemantic,
            "binary_op_type_checking_impl",
            functools.partialmethod(_check_types, check_types),
        )
        quick = dataclasses.replace(interpreter.interpreter_builder.options)
        object.__setattr__(quick, "sanitize_overflow", False)
        patch.setattr(interpreter.interpreter_builder, "options", quick)
        yield


def _init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if type.is_block() else _OF_SCALARS


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape)
    vars(self).update(_block_type(element_ty, sizes))


@functools.cache
def _block_type(element_type: tl.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a type of blocks."""
    block = object.__new__(tl.block_type)
    _INIT_BLOCK_TYPE(block, element_type, list(shape))
    return {**vars(block), "of_tensors": _of_tensors(shape)}


@functools.cache
def _of_tensors(shape: tuple[int, ...]) -> tuple[tl.constexpr, tl.tuple]:
    """The number of elements and the shape in the form in which a tensor holds them."""
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(n) for n in shape])


def _check_types(
    self: semantic.TritonSemantic, check: Any, left: Any, right: Any, *args: Any, **kwargs: Any
) -> tuple[tl.tensor, tl.tensor]:
    """Make the operands' types the same; those of most operations need no arithmetic for that."""
    if isinstance(left, tl.tensor) and left.dtype is tl.int32:
        right = _as_constant(self, right)
    elif isinstance(right, tl.tensor) and right.dtype is tl.int32:
        left = _as_constant(self, left)
    both = isinstance(left, tl.tensor) and isinstance(right, tl.tensor)
    if not both or left.dtype is not right.dtype or left.dtype not in _PROMOTED_TO_THEMSELVES:
        return check(self, left, right, *args, **kwargs)
    return (left, right) if left.shape is right.shape else self.broadcast_impl_value(left, right)


def _as_constant(self: semantic.TritonSemantic, value: Any) -> Any:
    is_int32 = type(value) is int and -(2**31) <= value < 2**31
    return self.scalar_constant(value, tl.int32) if is_int32 else value


_INIT_BLOCK_TYPE = tl.block_type.__init__
_OF_SCALARS = _of_tensors(())
_PROMOTED_TO_THEMSELVES = {tl.int1, tl.int32, tl.int64, tl.float32}
