"""Trace: the calls of a network one by one, with the layer that makes each, and why it is that one.

A trace is a capture that also runs where there is nothing to replay. Which layer calls is read from
Python's stack: the innermost method of a module that the network has. So nothing is hooked into the
modules, and calls of one module's methods by another are those of the module that they belong to.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from ops.cpu.binding import Kernel
from ops.cpu.build import status
from ops.cpu.flops import function_flops, kernel_flops
from ops.cpu.policy import Asked, explaining
from ops.replay.capture import NEW, Capture
from ops.replay.clock import clock
from ops.replay.graph import tensors_in

__all__ = ["Trace", "TracedCall"]

Shape = tuple[int, ...]


@dataclass
class TracedCall:
    """A call of a kernel, or of a function of torch that computes something.

    Attributes:
        layer: the path of the module that called; empty for the network itself.
        library: ``"ours"``, ``"oneDNN"`` (asked directly) or ``"torch"``.
        kernel: the operator or function, by its name there.
        inputs: the shapes of the tensors that it was given, weights among them.
        outputs: the shapes of what it returned or wrote to.
        dtype: of the first output.
        instruction_set: that the kernel was compiled for; None for other libraries' functions.
        rules: of :mod:`ops.cpu.policy`, that were asked before; empty where nothing was to choose.
        flops: see :mod:`ops.cpu.flops`; None where they are not counted.
        seconds: that the call took, without the Python around it, see :mod:`ops.replay.clock`.
        lowered_from: the function of torch that the kernel stands for in replays, if it does.
    """

    layer: str
    library: str
    kernel: str
    inputs: list[Shape]
    outputs: list[Shape]
    dtype: str
    instruction_set: str | None
    rules: list[Asked]
    flops: int | None
    seconds: float
    lowered_from: str | None = None

    @property
    def rule(self) -> str:
        """Why this kernel: the rules in words; empty where nothing was to choose."""
        if self.lowered_from is not None:
            return f"a small {self.lowered_from}, without torch in replays"
        return "; ".join(map(str, self.rules))


class Trace(Capture):
    """Notes the calls that follow from an input while it is entered; see :class:`Capture`.

    Args:
        x: the input.
        network: whose modules' paths are noted.

    Attributes:
        traced: the calls; as many as the graph has where there is one, in the same order.
    """

    def __init__(self, x: Tensor, network: nn.Module) -> None:
        super().__init__(x)
        self.traced: list[TracedCall] = []
        self._modules = {id(module): (path, module) for path, module in network.named_modules()}
        self._asked: dict[str, list[Asked]] = defaultdict(list)  # by layer, since its last call
        self._refused: dict[str, list[Asked]] = {}  # by layer: why its next calls are torch's
        self._clock, self._begin = clock(), 0.0

    def __enter__(self) -> Trace:
        self._explained = explaining(self._note_rule)
        self._explained.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._explained.__exit__(*error)

    # -- functions of torch ----------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        begin = self._clock()
        result = func(*args, **kwargs)
        seconds = self._clock() - begin
        self._try(self._note_function, func, args, kwargs, result)
        name = _name_of(func)
        outputs = list(tensors_in(args[:1] if name.endswith(".__setitem__") else (result,)))
        if _computes(name, args, kwargs, outputs):
            inputs = list(tensors_in((args, kwargs)))
            flops = function_flops(name, args, kwargs, result)
            library = "oneDNN" if name.startswith("mkldnn.") else "torch"
            self._add(library, _short(name), inputs, outputs, None, flops, seconds)
        return result

    # -- kernels ---------------------------------------------------------------------------------

    def kernel_called(self, kernel: Kernel, function: Any, arguments: Sequence[Any]) -> None:
        super().kernel_called(kernel, function, arguments)
        self._begin = self._clock()

    def kernel_returned(self, kernel: Kernel, given: dict[str, Any], result: Any) -> None:
        seconds = self._clock() - self._begin
        with torch._C.DisableTorchFunction():
            inputs = list(tensors_in(given))
            outputs = list(tensors_in((given["out"] if result is None else result,)))
            flops = kernel_flops(kernel.name, given, result)
            isa = status(kernel.library).instruction_set
            self._add("ours", kernel.name, inputs, outputs, isa, flops, seconds)

    # -- layers and rules ------------------------------------------------------------------------

    def _add(
        self,
        library: str,
        kernel: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        isa: str | None,
        flops: int | None,
        seconds: float,
    ) -> None:
        layer, module = self._caller()
        rules = self._rules_of(layer, module, library == "ours")
        dtype = str(outputs[0].dtype).removeprefix("torch.")
        shapes = _shapes(inputs), _shapes(outputs)
        self.traced.append(
            TracedCall(layer, library, kernel, *shapes, dtype, isa, rules, flops, seconds)
        )

    def _rules_of(self, layer: str, module: nn.Module | None, is_ours: bool) -> list[Asked]:
        """Those that led to a call: what was asked before it, or when weights were packed.

        Where a rule said no, all that torch computes in the layer follows from it. Where it said
        yes, torch may still copy what our kernel is going to read.
        """
        asked = self._asked[layer]
        if asked and (is_ours or not asked[-1].answer):
            del self._asked[layer]
            self._refused[layer] = [] if asked[-1].answer else asked
            return asked
        if not is_ours and self._refused.get(layer):
            return self._refused[layer]
        decisions = list(getattr(module, "decisions", ()))
        return decisions if is_ours or not all(d.answer for d in decisions) else []

    def _note_rule(self, asked: Asked) -> None:
        layer, _ = self._caller()
        if asked not in self._asked[layer]:
            self._asked[layer].append(asked)

    def _caller(self) -> tuple[str, nn.Module | None]:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                found = self._modules.get(id(frame.f_locals.get("self")))
                if found is not None:
                    return found
            frame = frame.f_back  # type: ignore[assignment]
        return "", None


def _shapes(tensors: Sequence[Tensor]) -> list[Shape]:
    return [tuple(t.shape) for t in tensors]


def _name_of(func: Any) -> str:
    if isinstance(func, torch._ops.OpOverload):
        return str(func)
    return resolve_name(func) or getattr(func, "__name__", str(func))


def _computes(name: str, args: Any, kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> bool:
    """Whether a function does more than to look at tensors, or to allocate memory."""
    if not outputs or name in NEW:
        return False
    # Of what oneDNN packed, the memory is not to be seen; it is no view of anything.
    given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs)) if not t.is_mkldnn}
    if any(t.is_mkldnn or t.untyped_storage().data_ptr() not in given for t in outputs):
        return True
    return _is_in_place(name) or "out" in kwargs


def _is_in_place(name: str) -> bool:
    last = name.removesuffix(".default").rpartition(".")[2]
    if last.startswith("__"):
        return last.startswith("__i") or last == "__setitem__"
    return last.endswith("_")


def _short(name: str) -> str:
    if name.startswith("mkldnn."):
        return name.split(".")[1].strip("_").removesuffix("_pointwise")
    return name.rpartition(".")[2] or name
