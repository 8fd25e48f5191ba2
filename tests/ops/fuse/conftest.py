"""The law of ``fuse()``: a fused module returns, leaves behind and raises what the plain one does.

A script is played twice, with a plain and with a fused module, and compared after every call. Its
parts are pieces of Python, so that a row of a table and a generated program are data. They run in
a Python module of their own, whose globals count as what a call leaves behind.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import functools
import io
import itertools
import linecache
import math
import operator
import os
import pickle
import random
import sys
import textwrap
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import backbones

# Compiled for each script, so that nothing is known of its functions from others.
_NET = """\
class Net(nn.Module):
    def __init__(m):
        super().__init__()
        m.a = nn.Conv2d(3, 8, 3, padding=1)
        m.c = nn.Conv2d(8, 8, 3, padding=1)
        m.register_buffer("buf", torch.zeros(1))

    def body(m, x):
        return m.c(F.relu(m.a(x)))

    def tokens(m, x):  # (B, 16, 8)
        return F.adaptive_avg_pool2d(m.body(x), 4).flatten(2).transpose(1, 2)

    def forward(m, TAKES):
"""


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


def aside(function: Callable[[], Any]) -> Any:
    """Call a function in another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


_NAMES = {
    **{"torch": torch, "nn": nn, "F": F, "np": np, "math": math, "os": os, "random": random},
    **{"copy": copy, "functools": functools, "itertools": itertools, "pickle": pickle},
    **{"collections": collections, "contextlib": contextlib, "contextvars": contextvars},
    **{"threading": threading, "types": types, "warnings": warnings, "aside": aside, "Stop": Stop},
}


def evaluated(module: nn.Module) -> nn.Module:
    """The plain module, prepared as ``fuse()`` says that it does."""
    for parameter in module.parameters():
        parameter.requires_grad = False
    return module.eval()


@pytest.fixture(scope="session")
def law() -> Callable[..., None]:
    """Asserts that a script is the same with a plain and with a fused module, see ``_play``."""

    def check(
        forward: str | None, *, raises: bool | None = False, within: float = 1e-4, **parts: Any
    ) -> None:
        """
        Args:
            forward: None if ``init`` makes the module.
            raises: whether some of the plain module's calls do; None: they may.
            within: the largest relative error.
        """
        plain, fused = ([*_play(forward, f, **parts)] for f in (evaluated, backbones.fuse))
        __tracebackhide__ = True
        errors = [call.get("error") for call in plain]
        assert raises in (None, any(errors)), errors
        for number, calls in enumerate(zip(plain, fused, strict=True), 1):
            if wrong := [*_differences(*calls, within)]:
                shown = "\n".join(f"  {line}" for line in wrong[:6])
                pytest.fail(f"call {number}:\n{shown}\nof\n{forward}")

    return check


def _play(
    forward: str | None,
    fuse: Callable[[nn.Module], nn.Module],
    *,
    takes: str = "x",
    init: str = "",
    then: str = "",
    before: str = "",
    change: str = "",
    call: str = "m(x)",
    end: str = "",
    mode: str = "torch.no_grad()",
    calls: int = 6,
    when: Iterable[int] = (),
    spoil: bool = True,
    names: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run a script, and describe everything that it could see after each call.

    Args:
        forward: statements, or an expression, of the module ``m`` and what it ``takes``.
        init: runs before ``m`` is fused; may make another module.
        then: runs after.
        before: runs before call ``i``, for which there is a random image ``x``.
        change: runs before it if i is in ``when``.
        call: an expression, in the ``mode``.
        end: runs at last.
        spoil: multiply the results of each call, as its caller may, before they are described.
        names: further ones that the script uses.
    """
    images = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        shape = shape or (2, 3, 16, 16)
        return torch.randn(shape, generator=images, dtype=torch.float32)

    world: Any = types.ModuleType(f"law_{next(_numbers)}")
    scope = vars(world)
    scope.update(_NAMES, **(names or {}), draw=draw, fuse=fuse)
    given = {*scope}
    sys.modules[world.__name__] = world
    threads = torch.get_num_threads()
    try:
        _seed()
        if forward is not None:
            source = _NET.replace("TAKES", takes) + _indented(forward)
            _run(source, scope, world.__name__)
            world.m = world.Net()
        _run(init, scope)
        world.m = fuse(world.m)
        _run(then, scope)
        _seed()
        for i in range(calls):
            world.i, world.x = i, draw()
            _run(before, scope)
            if i in when:
                with torch.no_grad():
                    _run(change, scope)
            outcome = _outcome(call, mode, scope)
            world.out = outcome.pop("out")
            if spoil:
                _spoil(world.out)
            seen = {n: scope[n] for n in sorted(scope.keys() - given) if not n.startswith("__")}
            yield _described({"m": world.m, **seen, **outcome})
    finally:
        _run(end, scope)
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(True)
        del sys.modules[world.__name__]
        linecache.cache.pop(f"{world.__name__}.py", None)


_numbers = itertools.count()


def _seed() -> None:
    torch.default_generator.manual_seed(0)  # of the CPU alone, which takes less time
    random.seed(0)
    np.random.seed(0)


def _indented(text: str) -> str:
    """A function's statements, or the expression that it returns."""
    text = textwrap.dedent(text).strip()
    with contextlib.suppress(SyntaxError):
        compile(text, "", "eval")
        text = f"return {text}"
    return textwrap.indent(text, " " * 8) + "\n"


def _run(text: str, scope: dict[str, Any], name: str = "script") -> None:
    """Execute text, as if it were the source of a file."""
    text = textwrap.dedent(text)
    linecache.cache[f"{name}.py"] = (len(text), None, text.splitlines(True), f"{name}.py")
    exec(_compiled(text, f"{name}.py", scope["__name__"]), scope)


@functools.lru_cache(maxsize=8)
def _compiled(text: str, name: str, world: str) -> types.CodeType:
    return compile(text, name, "exec")


def _outcome(call: str, mode: str, scope: dict[str, Any]) -> dict[str, Any]:
    """What a call returns, prints, warns of and raises, and the global states after it."""
    printed = io.StringIO()
    found: dict[str, Any] = {"out": None}
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(printed),
        eval(mode, scope),
    ):
        warnings.simplefilter("always")
        try:
            found["out"] = eval(call, scope)
        except (Exception, Stop) as error:
            found["error"] = f"{type(error).__qualname__}: {error}"
        found["modes"] = (
            *(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            *(torch.is_autocast_enabled("cpu"), torch.get_default_dtype()),
            *(torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()),
        )
    if isinstance(found["out"], types.GeneratorType):
        found["out"] = ("generated", *found["out"])
    found["printed"] = printed.getvalue()
    found["warned"] = [str(w.message) for w in warned if w.filename.startswith("law_")]
    numpy = np.random.get_state(legacy=True)
    found["random"] = (torch.get_rng_state(), random.getstate(), (numpy[2], numpy[1].tobytes()))
    found["random"] = tuple(map(_digest, found["random"]))
    return found


def _digest(state: Any) -> int:
    return hash(state.numpy().tobytes() if isinstance(state, Tensor) else state)


# -- descriptions --------------------------------------------------------------------------------

_ATOMS = (bool, int, float, complex, str, bytes, slice, range, type(None), type(...), np.generic)
_ATOMS += (torch.dtype, torch.device, torch.layout, torch.memory_format)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_NAMED += (RemovableHandle, contextvars.ContextVar)
_BY_VALUE = (*_ATOMS, *_NAMED, tuple, frozenset)  # whether they are the same object, none can tell
_Seen = dict[int, tuple[str, Any]]  # by id, with the object, so that no other one gets its id
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _walk(value: Any, path: str, seen: _Seen) -> Iterator[tuple[str, Any, str | None]]:
    """Everything in a value: its path, the object, and the path where it has been met before."""
    if not isinstance(value, _BY_VALUE):
        if id(value) in seen:
            yield path, value, seen[id(value)][0]
            return
        seen[id(value)] = path, value
    yield path, value, None
    for name, child in _children(value):
        yield from _walk(child, f"{path}{name}", seen)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (*_ATOMS, *_NAMED)):
        return
    found = dict(getattr(value, "__dict__", {}))
    found |= {name: getattr(value, name) for name in getattr(type(value), "__slots__", ())}
    if isinstance(value, torch.jit.ScriptModule):
        found = value.state_dict()
    elif isinstance(value, nn.Module):
        found = {name: item for name, item in found.items() if not name.startswith("_")}
        if type(value).__module__.startswith("torch.nn."):  # at once, since there are many
            settings = {n: v for n, v in found.items() if isinstance(v, (*_ATOMS, tuple))}
            found = {n: v for n, v in found.items() if n not in settings}
            found["settings"] = repr(settings)
        found |= {**value._parameters, **value._buffers, **value._modules}
        found |= {name: [*hooks.values()] for name in _HOOKS if (hooks := getattr(value, name))}
        found |= {"buffers": [*value._buffers]} if value._buffers else {}
    elif isinstance(value, Tensor):
        with contextlib.suppress(RuntimeError):  # of views whose history isn't known
            found |= {"grad": value.grad} if value.is_leaf and value.grad is not None else {}
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple | collections.deque):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    yield from ((f".{name}", item) for name, item in found.items() if name[:2] != "__")


def _described(values: dict[str, Any]) -> dict[str, Any]:
    """What can be said about values and all that they hold, by path."""
    found: dict[str, Any] = {}
    seen: _Seen = {}
    modules = [m for m in values.values() if isinstance(m, nn.Module)]
    state = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
    for name, value in values.items():
        for path, item, before in _walk(value, name, seen):
            if before is not None:
                found[path] = f"is {before}"
                continue
            found[path] = _summary(item, id(item) in state)
            if isinstance(item, Tensor):
                dense = item.detach() if item.layout == torch.strided else item.detach().to_dense()
                found[f"{path} values"] = dense.as_subclass(Tensor).clone()
            elif isinstance(item, np.ndarray):
                found[f"{path} values"] = torch.from_numpy(item.copy())
    return found


def _summary(value: Any, is_state: bool) -> Any:
    """The kind of an object, and what it is if it holds nothing."""
    kind = type(value).__qualname__
    if isinstance(value, Tensor):
        kind = f"{kind}, {value.dtype}, {[*value.shape]}, {value.layout}, {value.requires_grad}"
        if is_state or value.layout != torch.strided:  # fuse() may store weights in another order
            return kind
        return f"{kind}, strides {value.stride()}, inference {value.is_inference()}"
    if isinstance(value, np.ndarray):
        return f"{kind}, {value.dtype}, {value.shape}, {value.strides}"
    if isinstance(value, _ATOMS):
        return kind, value
    if isinstance(value, _NAMED):
        return kind, getattr(value, "__name__", "")
    if isinstance(value, set | frozenset):
        return kind, sorted(map(repr, value))
    if isinstance(value, torch.Generator):
        return kind, _digest(value.get_state())
    if isinstance(value, np.random.Generator):
        return kind, repr(value.bit_generator.state)
    return kind, operator.length_hint(value) if hasattr(value, "__length_hint__") else None


def _differences(plain: dict[str, Any], fused: dict[str, Any], within: float) -> Iterator[str]:
    for path in plain | fused:
        expected, found = (values.get(path, "missing") for values in (plain, fused))
        if not _is_same(expected, found, within):
            if isinstance(expected, Tensor) and isinstance(found, Tensor):
                expected, found = (t.flatten()[:4].tolist() for t in (expected, found))
            yield f"{path}: plain {expected}, fused {found}"
    if not plain.keys() ^ fused.keys() and [*plain] != [*fused]:
        yield f"in another order: plain {[*plain]}, fused {[*fused]}"


def _is_same(a: Any, b: Any, within: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and _is_close(a, b, within)
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_is_same(*pair, within) for pair in zip(a, b, strict=True))
    if isinstance(a, float | np.floating):
        return math.isclose(a, b, rel_tol=within, abs_tol=within / 10) or (a != a and b != b)
    return bool(a == b)


def _is_close(a: Tensor, b: Tensor, within: float) -> bool:
    """Relative to the largest value, and not finer than that of activations."""
    if not (a.is_floating_point() or a.is_complex()) or a.numel() == 0:
        return torch.equal(a, b)
    within = max(within, 0.02 if a.dtype.itemsize == 2 else 0)
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    bound = within * a.abs().nan_to_num(0, 0).max().clamp(min=0.1)
    return bool(((a == b) | ((a - b).abs() <= bound) | (a.isnan() & b.isnan())).all())


def _spoil(out: Any) -> None:
    """Multiply what a call returned, which is its caller's; expanded tensors can't be."""
    for _, item, before in _walk(out, "", {}):
        if before is not None:
            continue
        if isinstance(item, np.ndarray) and item.flags.writeable:
            np.multiply(item, 2, out=item, casting="unsafe")
        elif isinstance(item, Tensor):
            with (
                contextlib.suppress(RuntimeError),
                torch.inference_mode(item.is_inference()),
                torch.no_grad(),
            ):
                item.mul_(2)
