"""Triton's interpreter without the overhead that takes nine tenths of its time in small tests."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import triton
import triton.language as tl


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """In interpreter mode, patch triton.language only once and skip overflow checks.

    By default, the interpreter patches triton.language for every call of a device function, with
    the same effect each time, and checks every integer operation for overflow.
    """
    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    patch_lang, patched = interpreter._patch_lang, set()

    def patch_once(function):
        names = {n for n, m in function.__globals__.items() if m is tl or m is tl.core}
        if frozenset(names) not in patched:
            patch_lang(function)
            patched.add(frozenset(names))
        return types.SimpleNamespace(restore=lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        quick = dataclasses.replace(interpreter.interpreter_builder.options)
        object.__setattr__(quick, "sanitize_overflow", False)
        patch.setattr(interpreter.interpreter_builder, "options", quick)
        yield
