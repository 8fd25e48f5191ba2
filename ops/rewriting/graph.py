"""The operators of a call as a graph that rewrites change: values, and what computes them.

A rewrite is a function of a graph and one of its operators that replaces operators by others with
the same results; see :mod:`ops.rewriting.rewrite` for their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ops.cpu.call.binding import Kernel
from ops.cpu.policy import Decision
from ops.inference.packed_linear import Quantization

__all__ = [
    "NCHW",
    "NHWC",
    "Operator",
    "OperatorGraph",
    "Program",
    "Value",
    "by_name",
    "is_available",
]

# Orders of axes: of NCHW maps with channels last, and back.
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(eq=False)
class Value:
    """A tensor of the call: the input, the result of an operator, or a constant.

    Attributes:
        shape, dtype: of the tensor.
        constant: the tensor, if it is the same in every call.
        producer: the operator that returns it, if any.
        users: the operators that read it, once for each argument.
        quantization: of the layer whose weight it is, if that computes in int8.
    """

    shape: torch.Size
    dtype: torch.dtype
    constant: Tensor | None = None
    producer: Operator | None = field(default=None, repr=False)
    users: list[Operator] = field(default_factory=list, repr=False)
    quantization: Quantization | None = None

    @classmethod
    def like(cls, t: Tensor) -> Value:
        return cls(t.shape, t.dtype)

    @classmethod
    def of_constant(cls, t: Tensor) -> Value:
        return cls(t.shape, t.dtype, t)


@dataclass(eq=False)
class Operator:
    """A function with its arguments: an operator of ATen, or a layer made from some.

    Attributes:
        function: an ``OpOverload``, a kernel or an ``nn.Module``.
        args, kwargs: with values in place of tensors, also within lists.
        results: the values that it returns; none if it writes to an argument.
        returns_list: whether it returns several tensors.
        path: of the module that called it; empty for the network itself.
        decisions: the rules of :mod:`ops.cpu.policy` that this module consulted before.
        rewrites: the names of those that made it, in their order.
    """

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[Value]
    returns_list: bool = False
    path: str = ""
    decisions: tuple[Decision, ...] = ()
    rewrites: tuple[str, ...] = ()

    def __call__(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """The results for tensors in place of the values."""
        made = self.function(*args, **kwargs)
        if not self.results:  # it writes to an argument
            return ()
        return tuple(made) if self.returns_list else (made,)

    @property
    def name(self) -> str:
        """Such as ``aten.add.Tensor``, or the class of a layer."""
        if isinstance(self.function, nn.Module):
            return type(self.function).__name__
        if isinstance(self.function, Kernel):
            return self.function.name
        return str(self.function)

    @property
    def result(self) -> Value:
        """The only result."""
        (result,) = self.results
        return result

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of an operator of ATen by name."""
        return by_name(self.function, self.args, self.kwargs)

    def values(self) -> Iterator[Value]:
        """The values among its arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return (leaf for leaf in leaves if isinstance(leaf, Value))


class OperatorGraph:
    """The operators of a call in execution order.

    Args:
        source: the value of the input tensor.
        operators: in execution order; their values refer to them afterwards.
        outputs: what the call returns, with values in place of tensors.
    """

    def __init__(self, source: Value, operators: list[Operator], outputs: Any) -> None:
        self.source, self.operators, self.outputs = source, operators, outputs
        self.rewrite = ""  # the name of the present one
        for operator in operators:
            self._connect(operator)

    def _connect(self, operator: Operator) -> None:
        for value in operator.values():
            value.users.append(operator)
        for value in operator.results:
            value.producer = operator

    def _disconnect(self, operator: Operator) -> None:
        for value in operator.values():
            value.users.remove(operator)

    def is_output(self, value: Value) -> bool:
        """Whether the call returns the value."""
        return any(leaf is value for leaf in pytree.tree_leaves(self.outputs))

    def only_user(self, value: Value) -> Operator | None:
        """The operator that alone reads the value, which the call does not return."""
        if len(value.users) != 1 or self.is_output(value):
            return None
        return value.users[0]

    def made_by(self, value: Any, *kinds: Any) -> Operator | None:
        """The producer of a value if its function is of these: operators of ATen, or classes."""
        producer = value.producer if isinstance(value, Value) else None
        if producer is None:
            return None
        function = producer.function
        is_one = any(
            isinstance(function, kind) if isinstance(kind, type) else function is kind
            for kind in kinds
        )
        return producer if is_one else None

    def permuted(self, value: Any, order: list[int]) -> Operator | None:
        """The producer of a value if it is a permutation in this order."""
        made = self.made_by(value, torch.ops.aten.permute.default)
        return made if made is not None and list(made.args[1]) == order else None

    def replace(
        self,
        operator: Operator,
        function: Any,
        *args: Any,
        absorbed: Sequence[Operator] = (),
        **kwargs: Any,
    ) -> Operator:
        """Replace ``operator`` by another function that computes its results.

        Args:
            absorbed: operators that the function contains; they are removed. The first one's path
                becomes that of the new operator.
        """
        path = absorbed[0].path if absorbed else operator.path
        made = Operator(function, list(args), kwargs, operator.results, operator.returns_list, path)
        made.rewrites = self._noted(*absorbed, operator)
        self.operators[self.operators.index(operator)] = made
        self._disconnect(operator)
        self._connect(made)
        for other in absorbed:
            self.remove(other)
        return made

    def change(self, operator: Operator, function: Any = None) -> None:
        """Note that the present rewrite changed an operator, or gave it another function."""
        operator.function = function or operator.function
        operator.rewrites = self._noted(operator)

    def _noted(self, *operators: Operator) -> tuple[str, ...]:
        """The rewrites that made operators, and the present one."""
        before = (name for operator in operators for name in operator.rewrites)
        return tuple(dict.fromkeys((*before, self.rewrite)))

    def insert_before(
        self, operator: Operator, function: Any, *args: Any, shape: Sequence[int] | None = None
    ) -> Value:
        """Compute something before ``operator``: of a constant at once. Returns its value.

        Args:
            shape: of the result; by default as ATen's function of the arguments gives it.
        """
        values = [a for a in args if isinstance(a, Value)]
        if all(v.constant is not None for v in values):
            return Value.of_constant(function(*(_tensor(a) for a in args)))
        if shape is None:
            shape = function(*(_meta(a) for a in args)).shape
        result = Value(torch.Size(shape), values[0].dtype)
        made = Operator(function, list(args), {}, [result], path=operator.path)
        made.rewrites = self._noted(operator)
        self.operators.insert(self.operators.index(operator), made)
        self._connect(made)
        return result

    def substitute(self, value: Value, by: Value) -> None:
        """Let everything that reads ``value`` read another one, which is computed before it."""
        for user in list(value.users):
            self._disconnect(user)
            user.args, user.kwargs = pytree.tree_map_only(
                Value, lambda v: by if v is value else v, (user.args, user.kwargs)
            )
            self._connect(user)
        self.outputs = pytree.tree_map_only(Value, lambda v: by if v is value else v, self.outputs)

    def bypass(self, operator: Operator, value: Value) -> None:
        """Remove an operator; what reads its result reads ``value`` instead."""
        self.substitute(operator.result, value)
        self.remove(operator)

    def remove(self, operator: Operator) -> None:
        """Remove an operator whose results nothing reads."""
        self.operators.remove(operator)
        self._disconnect(operator)

    def remove_unused(self) -> None:
        """Remove all operators whose results nothing reads, if they have any."""
        for operator in reversed(list(self.operators)):
            if operator.results and not any(v.users or self.is_output(v) for v in operator.results):
                self.remove(operator)

    def __str__(self) -> str:
        """One line per operator."""
        names: dict[int, str] = {id(self.source): "input"}
        lines = []
        for operator in self.operators:
            given = pytree.tree_map_only(
                Value, lambda v: names.get(id(v), "constant"), (operator.args, operator.kwargs)
            )
            for value in operator.results:
                names[id(value)] = f"%{len(names) - 1}"
            args = [str(a) for a in given[0]] + [f"{k}={v}" for k, v in given[1].items()]
            made = ", ".join(names[id(v)] for v in operator.results)
            lines.append(f"{made} = {operator.name}({', '.join(args)})")
        result = pytree.tree_map_only(Value, lambda v: names.get(id(v), "constant"), self.outputs)
        return "\n".join([*lines, f"return {result}"])


class Program:
    """Runs the operators of a graph; intermediate tensors are freed after their last use.

    Args:
        graph: not changed afterwards.
    """

    def __init__(self, graph: OperatorGraph) -> None:
        self.graph = graph
        last: dict[Value, int] = {}
        for now, operator in enumerate(graph.operators):
            last.update(dict.fromkeys((*operator.values(), *operator.results), now))
        kept = {leaf for leaf in pytree.tree_leaves(graph.outputs) if isinstance(leaf, Value)}
        self._freed: dict[int, list[Value]] = defaultdict(list)
        for value, now in last.items():
            if value not in kept and value.constant is None:
                self._freed[now].append(value)

    def __call__(self, x: Tensor) -> Any:
        """The result of the recorded call for an ``x`` of the same shape and dtype."""
        tensors: dict[Value, Tensor] = {self.graph.source: x}

        def tensor(value: Value) -> Tensor:
            return tensors[value] if value.constant is None else value.constant

        for now, operator in enumerate(self.graph.operators):
            args, kwargs = pytree.tree_map_only(Value, tensor, (operator.args, operator.kwargs))
            tensors.update(zip(operator.results, operator(args, kwargs), strict=True))
            for value in self._freed[now]:
                tensors.pop(value, None)
        return pytree.tree_map_only(Value, tensor, self.graph.outputs)


def by_name(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operator of ATen by name, with defaults for those not given."""
    arguments = function._schema.arguments
    defaults = {a.name: a.default_value for a in arguments}
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def is_available(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether a kernel computes tensors of a dtype on the CPU, where rewritten calls run."""
    return kernel.unavailable(torch.device("cpu"), dtype) is None


def _tensor(argument: Any) -> Any:
    return argument.constant if isinstance(argument, Value) else argument


def _meta(argument: Any) -> Any:
    if not isinstance(argument, Value):
        return argument
    return torch.empty(argument.shape, dtype=argument.dtype, device="meta")
