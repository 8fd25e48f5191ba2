"""The binding of kernels to torch: schema, dispatch, arguments, errors, capture.

A kernel is described by a Python function of the same name that checks its arguments, allocates the
results and returns the arguments of the C function. :func:`kernel` registers it as a torch operator
(with a meta implementation for ``torch.compile`` and ``torch.export``) and bypasses torch's
dispatcher where that would only call the kernel: dispatch takes longer than computing a small map.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import operator
import struct
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ops.cpu import policy
from ops.cpu.activations import ACTIVATIONS
from ops.cpu.build import status, unavailable_reason
from ops.cpu.dispatch import is_plain_call
from ops.cpu.huge_pages import ask_for_huge_pages

__all__ = [
    "Addresses",
    "Call",
    "Kernel",
    "Observer",
    "kernel",
    "observed_by",
    "problem_of",
    "registered",
    "words_of",
]


class Addresses(NamedTuple):
    """A structure of pointers and numbers.

    Attributes:
        structure: see :func:`ops.cpu.structures.structure`; each field has 8 bytes or is itself
            such a structure.
        fields: the values: a tensor (its address), a tensor with an offset in bytes, a number, or
            the ``Addresses`` of a nested structure. Fields that are missing or None are zeros and
            null pointers.
    """

    structure: Any
    fields: dict[str, Any]

    def words(self) -> list[int | tuple[Tensor, int]]:
        """The 8-byte words in order: numbers, and tensors with offsets in bytes."""
        found: list[Any] = []
        for name, kind in self.structure._fields_:
            value = self.fields.get(name)
            if isinstance(value, Addresses):
                found += value.words()
            elif value is None:
                found += [0] * (ctypes.sizeof(kind) // 8)
            elif isinstance(value, Tensor):
                found.append((value, 0))
            elif isinstance(value, float):
                found += struct.unpack("=q", struct.pack("=d", value))
            else:
                found.append(value)
        return found


def problem_of(structure: Any, x: Tensor, axes: str = "", **fields: Any) -> Any:
    """A structure of numbers: the sizes that a kernel is called with.

    Args:
        structure: see :func:`ops.cpu.structures.structure`; its field ``bfloat16`` is set if ``x``
            has that dtype.
        axes: the fields for the sizes of the axes of ``x``, such as ``"batch height width dim"``;
            ``_`` skips an axis.
        fields: all other fields; activations are given by name.
    """
    sizes = dict(zip(axes.split(), x.shape, strict=False))
    sizes.pop("_", None)
    numbers = {n: ACTIVATIONS.index(v) if isinstance(v, str) else v for n, v in fields.items()}
    return structure(bfloat16=x.dtype == torch.bfloat16, **sizes, **numbers)


# Arguments of C functions: numbers, and the addresses of a structure or an array of structures of
# numbers, of a structure or an array of structures of pointers, and of tensors.
Argument = int | ctypes.Structure | ctypes.Array | Addresses | Sequence[Addresses] | Tensor


class Call(NamedTuple):
    """The result and the C arguments of a call.

    Attributes:
        result: what the operator returns, allocated; the kernel fills it in.
        arguments: makes the arguments of the C function; not called if only shapes are needed or
            the first result is empty.
    """

    result: Any
    arguments: Callable[[], Sequence[Any]]


class Observer(Protocol):
    """Notified of every kernel call in its thread, before and after the call."""

    def kernel_called(self, called: Kernel, function: Any, arguments: Sequence[Any]) -> None: ...

    def kernel_returned(self, called: Kernel, given: dict[str, Any], result: Any) -> None:
        """``given`` are the operator's arguments by name."""


class _Thread(threading.local):
    observer: Observer | None = None


_thread = _Thread()


class observed_by:  # noqa: N801 (a context manager that reads like a function)
    """Context manager that notifies ``observer`` of every call in this thread."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __enter__(self) -> Any:
        self._before, _thread.observer = _thread.observer, self._observer
        return self._observer

    def __exit__(self, *error: object) -> None:
        _thread.observer = self._before


registered = torch.library.Library("vision_backbones", "FRAGMENT")
_TYPES = {
    **{"Tensor": "Tensor", "Tensor | None": "Tensor?", "Sequence[Tensor]": "Tensor[]"},
    **{"int": "int", "Sequence[int]": "int[]", "bool": "bool", "Sequence[bool]": "bool[]"},
    **{"float": "float", "float | None": "float?", "Sequence[float]": "float[]"},
    **{"str": "str", "Sequence[str]": "str[]"},
}
_MOST_PLANS = 256  # layouts remembered per kernel
_UNKNOWN: Any = object()


def kernel(
    library: str,
    function: str,
    *,
    returns: str = "Tensor",
    mutates: Sequence[str] = (),
    large_results: bool = False,
    refuses: Callable[[torch.device, torch.dtype], str | None] | None = None,
) -> Callable[[Callable[..., Call]], Kernel]:
    """Decorator that makes a :class:`Kernel` from the function that describes its calls.

    Args:
        library: the name of its source, ``ops/cpu/<folder>/<library>.cpp``.
        function: the C function; it returns 0, or 1 if it ran out of memory.
        returns: the return type in the schema.
        mutates: parameters that are written to.
        large_results: whether results may be large enough to benefit from huge pages.
        refuses: returns why the kernel refuses a device and dtype that other kernels accept, or
            None.
    """

    def made_of(describe: Callable[..., Call]) -> Kernel:
        options = returns, mutates, large_results, refuses
        return Kernel(describe, library, function, *options)

    return made_of


class Kernel:
    """A kernel's C function, called like the Python function that describes it.

    There are no gradients. Plans are cached by the layout of the arguments, since describing a call
    takes longer than computing a small map.

    Raises:
        ValueError: the description rejects the arguments.
        RuntimeError: the library is not available here (check :meth:`unsupported` first).
        MemoryError: the scratch buffers cannot be allocated.
    """

    def __init__(
        self,
        describe: Callable[..., Call],
        library: str,
        function: str,
        returns: str,
        mutates: Sequence[str],
        large_results: bool,
        refuses: Callable[[torch.device, torch.dtype], str | None] | None,
    ) -> None:
        functools.update_wrapper(self, describe)
        self.name, self.library, self.function = describe.__name__, library, function
        self._describe, self._large_results, self._refuses = describe, large_results, refuses
        self._parameters = list(inspect.signature(describe).parameters.values())
        self._signature = _Signature([_TYPES[p.annotation] for p in self._parameters])
        schema = ", ".join(
            f"{_TYPES[p.annotation]}{'(a!)' if p.name in mutates else ''} {p.name}"
            for p in self._parameters
        )
        registered.define(f"{self.name}({schema}) -> {returns}")
        registered.impl(self.name, self._run, "CPU")
        # torch.library.register_fake would look up its caller's source: 10 ms per import.
        registered.impl(self.name, lambda *a: describe(*a).result, "Meta")
        self._dispatched = getattr(torch.ops.vision_backbones, self.name).default
        self._plans: dict[Hashable, _Plan | None] = {}

    def __repr__(self) -> str:
        return f"<kernel {self.name}: {self.function} of {self.library}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(self._parameters):
            args = self._complete(args, kwargs)
        tensors = self._signature.tensors(args)
        if not is_plain_call(tensors):
            return self._dispatched(*args)
        return self._run_plain(args, tensors)

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """``None`` if the kernel computes such tensors, else the reason.

        The first call on a machine compiles the library, which takes a few seconds.
        """
        return policy.left_to_torch(self.library, dtype) or self.refusal(device, dtype)

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the kernel cannot run on such tensors, even if torch would be faster."""
        if device.type != "cpu":
            return f"the kernel runs on the CPU, the tensors are on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the kernel takes float32 and bfloat16, not {dtype}"
        refused = None if self._refuses is None else self._refuses(device, dtype)
        return refused or unavailable_reason(self.library)

    def _complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments, by position."""
        missing = self._parameters[len(args) :]
        rest = [kwargs.pop(p.name, p.default) for p in missing]
        absent = [p.name for p, value in zip(missing, rest, strict=True) if value is p.empty]
        if kwargs or absent or len(args) > len(self._parameters):
            raise TypeError(
                f"{self.name}() takes {[p.name for p in self._parameters]}; missing {absent}, "
                f"unknown {list(kwargs)}"
            )
        return (*args, *rest)

    def _run(self, *args: Any) -> Any:
        return self._run_plain(args, self._signature.tensors(args))

    def _run_plain(self, args: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Any:
        observer = _thread.observer
        if observer is not None:
            return self._run_described(args, observer)[0].result
        layout = self._signature.layout(args, tensors)
        plan = self._plans.get(layout, _UNKNOWN)
        if plan is _UNKNOWN:
            call, arguments = self._run_described(args)
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[layout] = _Plan.of(tensors, call, arguments)
            return call.result
        if plan is None:
            return self._run_described(args)[0].result
        return self._run_planned(tensors, plan)

    def _run_described(
        self, args: tuple[Any, ...], observer: Observer | None = None
    ) -> tuple[Call, Sequence[Any]]:
        call = self._describe(*args)
        first = next(t for t in self._signature.tensors(args) if t is not None)
        reason = self.refusal(first.device, first.dtype)
        if reason is not None:
            raise RuntimeError(f"the kernel {self.name} is not available: {reason}")
        function = self._function()
        results = _results(call)
        if results and not results[0].numel():
            return call, ()
        if self._large_results:
            ask_for_huge_pages(*results)
        arguments = call.arguments()
        if not arguments:
            return call, ()
        for argument in arguments:
            _require_same_bytes(self.library, argument)
        if observer is not None:
            observer.kernel_called(self, function, arguments)
        with torch._C.DisableTorchFunction():
            self._invoke(function, [_pack(argument) for argument in arguments])
        if observer is not None:
            given = {p.name: value for p, value in zip(self._parameters, args, strict=True)}
            observer.kernel_returned(self, given, call.result)
        return call, arguments

    def _run_planned(self, tensors: Sequence[Tensor | None], plan: _Plan) -> Any:
        results = [torch.empty_strided(n, step, dtype=kind) for n, step, kind in plan.results]
        if self._large_results:
            ask_for_huge_pages(*results)
        self._invoke(self._function(), plan.arguments(tensors, results))
        return results[0] if plan.gives is Tensor else plan.gives(results) if results else None

    def _invoke(self, function: Any, arguments: Sequence[Any]) -> None:
        if function(*arguments):
            raise MemoryError(f"no memory for the scratch buffers of {self.name}")

    def _function(self) -> Any:
        return getattr(status(self.library).library, self.function)


class _Signature:
    """Which arguments are tensors, and the layout key of a call."""

    def __init__(self, types: Sequence[str]) -> None:
        self._single = [i for i, kind in enumerate(types) if kind in ("Tensor", "Tensor?")]
        self._lists = [i for i, kind in enumerate(types) if kind == "Tensor[]"]
        others = [i for i in range(len(types)) if i not in (*self._single, *self._lists)]
        self._values = [i for i in others if not types[i].endswith("[]")]
        self._sequences = [i for i in others if types[i].endswith("[]")]

    def tensors(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The tensors, single arguments before those in lists."""
        found = [args[i] for i in self._single]
        for i in self._lists:
            found += args[i]
        return found

    def layout(self, args: Sequence[Any], tensors: Sequence[Tensor | None]) -> Hashable:
        parts: list[Any] = [torch.get_num_threads()]
        for t in tensors:
            parts += (None,) if t is None else (t.shape, t.stride(), t.dtype)
        parts += [args[i] for i in self._values]
        for i in self._sequences:
            parts.append(tuple(args[i]))
        for i in self._lists:
            parts.append(len(args[i]))
        return tuple(parts)


class _Plan:
    """Makes the C arguments of calls with a known layout without describing them again.

    Args:
        templates: one per argument: a constant, the index of a pointer among the words of
            :meth:`arguments`, or a packer with the words that it packs.
        shifted: the index and the offset in bytes of each word that points inside a tensor.
        constants: words that are numbers.
        results: sizes, strides and dtypes.
        gives: what the operator returns: a tensor, several, or None.
    """

    def __init__(
        self,
        templates: Sequence[Any],
        shifted: Sequence[tuple[int, int]],
        constants: Sequence[int],
        results: Sequence[tuple[Any, ...]],
        gives: type,
    ) -> None:
        self._templates, self._shifted, self._constants = templates, shifted, list(constants)
        self.results, self.gives = results, gives

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor | None], call: Call, arguments: Sequence[Any]
    ) -> _Plan | None:
        """None if tensors were copied or created for the call, which then has to be described."""
        results = _results(call)
        if not arguments:
            return None
        known = [*tensors, *results]
        index = {id(t): i for i, t in enumerate(known)}
        of_arguments = [
            [(argument, 0)] if isinstance(argument, Tensor) else words_of(argument)
            for argument in arguments
        ]
        words = [word for of_one in of_arguments for word in of_one or ()]
        if any(not isinstance(word, int) and id(word[0]) not in index for word in words):
            return None
        keys = {w: w if isinstance(w, int) else (index[id(w[0])], w[1]) for w in words}
        shifted = sorted({k for k in keys.values() if isinstance(k, tuple) and k[1]})
        constants = sorted({k for k in keys.values() if isinstance(k, int)})
        place: dict[Any, int] = {(i, 0): i for i in range(len(known))}
        for key in (*shifted, *constants):
            place[key] = len(place)
        templates: list[Any] = []
        for argument, of_one in zip(arguments, of_arguments, strict=True):
            if of_one is None:
                templates.append(_pack(argument))
            elif isinstance(argument, Tensor):
                templates.append(place[keys[of_one[0]]])
            else:
                pick = operator.itemgetter(*(place[keys[word]] for word in of_one), 0)
                templates.append((struct.Struct(f"={len(of_one)}q"), pick))
        layouts = [(t.shape, t.stride(), t.dtype) for t in results]
        return cls(templates, shifted, constants, layouts, type(call.result))

    def arguments(self, tensors: Sequence[Tensor | None], results: Sequence[Tensor]) -> list[Any]:
        words = [0 if t is None else t.data_ptr() for t in (*tensors, *results)]
        words += [words[i] + offset for i, offset in self._shifted]
        words += self._constants
        return [
            t[0].pack(*t[1](words)[:-1])
            if isinstance(t, tuple)
            else ctypes.c_void_p(words[t])
            if isinstance(t, int)
            else t
            for t in self._templates
        ]


def words_of(argument: Any) -> list[int | tuple[Tensor, int]] | None:
    """The words of pointer structures or of a tensor; None for arguments without addresses."""
    if isinstance(argument, Addresses):
        return argument.words()
    if isinstance(argument, list):
        return [word for addresses in argument for word in addresses.words()]
    return None


def _require_same_bytes(library: str, argument: Any) -> None:
    """Raise an error if the library's structures differ from the headers' declarations."""
    of = argument[0] if isinstance(argument, list) else argument
    kind: Any = of.structure if isinstance(of, Addresses) else type(argument)
    if issubclass(kind, ctypes.Array):
        kind = kind._type_
    if issubclass(kind, ctypes.Structure):
        _compare_bytes(status(library).library, kind)


@functools.lru_cache(maxsize=256)
def _compare_bytes(library: Any, kind: Any) -> None:
    function = getattr(library, f"{kind.__name__.replace('::', '_')}_bytes")
    function.restype = ctypes.c_int64
    if function() != ctypes.sizeof(kind):
        raise RuntimeError(
            f"{kind.__name__} has {function()} bytes in the library and {ctypes.sizeof(kind)} here"
        )


def _results(call: Call) -> list[Tensor]:
    result = call.result
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def _pack(argument: Any) -> Any:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    words = words_of(argument)
    if words is None:
        return ctypes.byref(argument)
    addresses = [w if isinstance(w, int) else w[0].data_ptr() + w[1] for w in words]
    return ctypes.byref((ctypes.c_int64 * len(addresses))(*addresses))
