"""The binding of kernels to torch: schema, dispatch, arguments, errors, capture.

A kernel is described by a Python function of the same name that checks its arguments, allocates the
results and names the arguments of the C function that differ from its own. :func:`kernel` registers
it as a torch operator (with a meta implementation for ``torch.compile`` and ``torch.export``) and
bypasses torch's dispatcher where that would only call the kernel: dispatch takes longer than
computing a small map.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ops.cpu import policy
from ops.cpu.build import status, unavailable_reason
from ops.cpu.call.c_arguments import Call, arguments_by_name, names_of, pack
from ops.cpu.call.dispatch import is_plain_call
from ops.cpu.call.huge_pages import ask_for_huge_pages
from ops.cpu.call.repeated import RepeatedCall, Signature
from ops.cpu.call.structures import parameters


class _Thread(threading.local):
    observer: Any = None


_thread = _Thread()


@contextmanager
def observed_by(observer: Any) -> Iterator[Any]:
    """Context in which ``observer`` is notified of every call in this thread.

    Before it, ``kernel_called(kernel, function, arguments)`` is called, and afterwards
    ``kernel_returned(kernel, given, result)``; ``given`` are the operator's arguments by name.
    """
    before, _thread.observer = _thread.observer, observer
    try:
        yield observer
    finally:
        _thread.observer = before


@contextmanager
def unseen() -> Iterator[None]:
    """Context for what is computed once and kept, such as packed weights: no recording sees it."""
    with observed_by(None), _disable_current_modes():
        yield


registered = torch.library.Library("vision_backbones", "FRAGMENT")
_MOST_PLANS = 256  # layouts remembered per kernel
_UNKNOWN: Any = object()


_kernels: dict[Any, Kernel] = {}


def kernel_of(operator: Any) -> Kernel | None:
    """The kernel that an operator of torch calls, if it is one of ours."""
    return _kernels.get(operator)


def _type_of(parameter: inspect.Parameter) -> str:
    """The type in a schema of torch, such as ``Tensor?`` or ``int[]``."""
    name: str = parameter.annotation.replace(" | None", "?")
    return f"{name[9:-1]}[]" if name.startswith("Sequence[") else name


def kernel(library: str, function: str, **options: Any) -> Callable[[Callable[..., Call]], Kernel]:
    """Decorator that makes a :class:`Kernel` from the function that describes its calls."""
    return lambda describe: Kernel(describe, library, function, **options)


class Kernel:
    """A kernel's C function, called like the Python function that describes it.

    There are no gradients. Plans are cached by the layout of the arguments, since describing a call
    takes longer than computing a small map.

    Attributes:
        activation_index: the place among its arguments of the activation that it applies, if any.

    Args:
        describe: checks the arguments, see :class:`ops.cpu.call.c_arguments.Call`.
        library: the name of its source, ``ops/cpu/<folder>/<library>.cpp``.
        function: the C function; it returns 0, or 1 if it ran out of memory.
        returns: the number of tensors that it returns; 0 for None.
        mutates: parameters that are written to.
        large_results: whether results may be large enough to benefit from huge pages.
        refuses: returns why the kernel refuses a device and dtype that other kernels accept, or
            None.

    Raises:
        ValueError: the description rejects the arguments.
        RuntimeError: the library is not available here (check :meth:`unavailable` first).
        MemoryError: the scratch buffers cannot be allocated.
    """

    def __init__(
        self,
        describe: Callable[..., Call],
        library: str,
        function: str,
        *,
        returns: int = 1,
        mutates: Sequence[str] = (),
        large_results: bool = False,
        refuses: Callable[[torch.device, torch.dtype], str | None] | None = None,
    ) -> None:
        functools.update_wrapper(self, describe)
        self.name, self.library, self.function = describe.__name__, library, function
        self._describe, self._large_results, self._refuses = describe, large_results, refuses
        self._parameters = list(inspect.signature(describe).parameters.values())
        names = [p.name for p in self._parameters]
        self.activation_index = names.index("activation") if "activation" in names else None
        self._signature = Signature([_type_of(p) for p in self._parameters])
        schema = ", ".join(
            f"{_type_of(p)}{'(a!)' if p.name in mutates else ''} {p.name}" for p in self._parameters
        )
        returned = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
        registered.define(f"{self.name}({schema}) -> {returned}")
        registered.impl(self.name, self.run, "CPU")
        # torch.library.register_fake would look up its caller's source: 10 ms per import.
        registered.impl(self.name, lambda *a: describe(*a).result, "Meta")
        self._dispatched = getattr(torch.ops.vision_backbones, self.name).default
        self._plans: dict[Hashable, RepeatedCall | None] = {}
        _kernels[self._dispatched] = self

    def __repr__(self) -> str:
        return f"<kernel {self.name}: {self.function} of {self.library}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(self._parameters):
            args = self._complete(args, kwargs)
        tensors = self._signature.tensors(args)
        if not is_plain_call(tensors):
            return self._dispatched(*args)
        return self._run_plain(args, tensors)

    @torch.compiler.assume_constant_result
    def unavailable(
        self, device: torch.device, dtype: torch.dtype, *, even_if_slower: bool = False
    ) -> str | None:
        """``None`` if the kernel computes such tensors, else the reason.

        The first call on a machine compiles the library, which takes a few seconds.
        """
        reason = None if even_if_slower else policy.left_to_torch(self.library, dtype)
        if reason is not None:
            return reason
        if device.type != "cpu":
            return f"the kernel runs on the CPU, the tensors are on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the kernel supports float32 and bfloat16, not {dtype}"
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

    def run(self, *args: Any) -> Any:
        """Call it without torch's dispatcher, with all arguments by position."""
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
            given = [id(t) for t in tensors if t is not None]
            if len({*given}) == len(given):  # else it is not known which argument a pointer is of
                self._plans[layout] = None
                with suppress(KeyError):  # of tensors made for the call
                    if arguments:
                        self._plans[layout] = RepeatedCall(tensors, call, arguments)
            return call.result
        if plan is None:
            return self._run_described(args)[0].result
        return self._run_planned(tensors, plan)

    def _run_described(
        self, args: tuple[Any, ...], observer: Any = None
    ) -> tuple[Call, Sequence[Any]]:
        call = self._describe(*args)
        first = next(t for t in self._signature.tensors(args) if t is not None)
        reason = self.unavailable(first.device, first.dtype, even_if_slower=True)
        if reason is not None:
            raise RuntimeError(f"the kernel {self.name} is not available: {reason}")
        function = self._function()
        results = call.results()
        if results and not results[0].numel():
            return call, ()
        if self._large_results:
            ask_for_huge_pages(*results)
        arguments = self._arguments(args, call, first.dtype)
        if not arguments:
            return call, ()
        if observer is not None:
            observer.kernel_called(self, function, arguments)
        with torch._C.DisableTorchFunction():
            self._invoke(function, [pack(argument) for argument in arguments])
        if observer is not None:
            given = {p.name: value for p, value in zip(self._parameters, args, strict=True)}
            observer.kernel_returned(self, given, call.result)
        return call, arguments

    def _arguments(self, args: tuple[Any, ...], call: Call, dtype: torch.dtype) -> Sequence[Any]:
        """The arguments of the C function.

        What the description doesn't name are the operator's arguments of that name, made
        contiguous (``x`` is the C function's ``in``), the result ``out``, and the dtype.
        """
        given = call.arguments()
        if not given:
            return ()
        of_function, known, shared = self._interface
        if not given.keys() <= known:
            raise TypeError(f"{self.function} takes no {sorted(given.keys() - known)}")
        # Structures that the description gives whole need nothing else; a copy would be wasted.
        wanted = names_of({p: kind for p, kind in of_function.items() if p not in given})
        own = {n: _contiguous(args[i]) for i, n in shared if n in wanted and n not in given}
        own["bfloat16"] = dtype == torch.bfloat16
        if isinstance(call.result, Tensor):
            own["out"] = call.result
        return arguments_by_name(of_function, {**own, **given})

    @functools.cached_property
    def _interface(self) -> tuple[Mapping[str, Any], set[str], list[tuple[int, str]]]:
        """The C function's parameters, all names in them, and the operator's argument names."""
        of_function = parameters(self.library, self.function)
        known = names_of(of_function)
        names = ("in" if p.name == "x" else p.name for p in self._parameters)
        return of_function, known, [(i, n) for i, n in enumerate(names) if n in known]

    def _run_planned(self, tensors: Sequence[Tensor | None], plan: RepeatedCall) -> Any:
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


def _contiguous(value: Any) -> Any:
    copied = isinstance(value, Tensor) and not value.is_contiguous()
    return value.contiguous() if copied else value
