"""The operators of a call as a graph that rewrites change: values, and what computes them.

A rewrite is a function of a graph and one of its operators that replaces operators by others with
the same results; see :mod:`ops.rewriting.rewrite` for their order. It names its pattern in a
``match``: ``Value(function, [argument, …])`` is a value that this function of ATen, or a layer of
this class, computes from these arguments, and ``Operator(function, [argument, …])`` what does so.
Neither matches a call with arguments by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ops.cpu.call.binding import Kernel
from ops.cpu.policy import Decision
from ops.fuse.nested import leaves, mapped
from ops.inference.packed_linear import Quantization

__all__ = [
    "NCHW",
    "NHWC",
    "Operator",
    "OperatorGraph",
    "Origin",
    "Value",
    "by_name",
    "is_available",
    "on_meta",
    "permuted",
]

_aten = torch.ops.aten

# Orders of axes: of NCHW maps with channels last, and back.
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass
class Origin:
    """How a constant was computed, as from other constants.

    Attributes:
        index: of the result that it is, if there are several.
    """

    function: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    index: int | None = None


@dataclass(eq=False, match_args=False)
class Value:
    """A tensor of the call: the input, the result of an operator, or a constant.

    Attributes:
        shape, dtype: of the tensor.
        constant: the tensor, if it is the same in every call.
        producer: the operator that returns it, if any.
        users: the operators that read it, once for each argument, and the graph's end if the call
            returns it.
        quantization: of the layer whose weight it is, if that computes in int8.
        origin: of a constant that the call computed.
    """

    shape: torch.Size
    dtype: torch.dtype
    constant: Tensor | None = None
    producer: Any = field(default=None, repr=False)
    users: list[Operator] = field(default_factory=list, repr=False)
    quantization: Quantization | None = None
    origin: Origin | None = field(default=None, repr=False)

    __match_args__ = ("function", "positional")

    @property
    def function(self) -> Any:
        """What computes it, if anything does."""
        return self.producer and self.producer.function

    @property
    def positional(self) -> Any:
        """What it is computed from, if no argument is given by name."""
        return self.producer and self.producer.positional

    @property
    def user(self) -> Operator | None:
        """The operator that alone reads it, if the call does not return it."""
        (user,) = self.users if len(self.users) == 1 else (None,)
        return None if user is None or user.function is None else user

    @property
    def once(self) -> bool:
        """Whether there is such an operator."""
        return self.user is not None

    def is_like(self, other: Any) -> bool:
        """Whether another argument is a value of the same shape and dtype."""
        same = isinstance(other, Value) and other.shape == self.shape
        return same and other.dtype == self.dtype

    @classmethod
    def like(cls, t: Tensor) -> Value:
        return cls(t.shape, t.dtype)

    @classmethod
    def of_constant(cls, t: Tensor) -> Value:
        return cls(t.shape, t.dtype, t)


@dataclass(eq=False, match_args=False)
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

    __match_args__ = ("function", "positional")

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
    def positional(self) -> list[Any] | None:
        """Its arguments, if none is given by name."""
        return None if self.kwargs else self.args

    @property
    def in_both_orders(self) -> tuple[list[Any], list[Any]]:
        """The two arguments of a sum or product."""
        return self.args[:2], self.args[1::-1]

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of an operator of ATen by name."""
        return by_name(self.function, self.args, self.kwargs)

    def values(self) -> Iterator[Value]:
        """The values among its arguments."""
        return (leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Value))


class OperatorGraph:
    """The operators of a call in execution order; those whose results nothing reads are removed.

    Args:
        sources: the values of the input tensors.
        operators: in execution order; their values refer to them afterwards.
        outputs: what the call returns, with values in place of tensors.

    Attributes:
        end: reads the outputs after all operators; it has no function.
        changed: whether anything was, as a rewrite may set back.
        rewrite: the name of the present one.
    """

    def __init__(self, sources: list[Value], operators: list[Operator], outputs: Any) -> None:
        self.sources, self.rewrite = sources, ""
        self.end = Operator(None, [outputs], {}, [])
        used, read = [self.end], {*self.end.values()}
        for operator in reversed(operators):
            if not operator.results or not read.isdisjoint(operator.results):
                used.append(operator)
                read.update(operator.values())
        for operator in reversed(used):
            self._connect(operator)
        self.operators = used[:0:-1]

    @property
    def outputs(self) -> Any:
        """What the call returns."""
        return self.end.args[0]

    def _connect(self, operator: Operator) -> None:
        self.changed = True
        for value in operator.values():
            value.users.append(operator)
        for value in operator.results:
            value.producer = operator

    def _disconnect(self, operator: Operator, values: Iterable[Value]) -> None:
        """Note that an operator no longer reads values, and remove those only made for it."""
        for value in values:
            value.users.remove(operator)
            made = value.producer
            if made is not None and not any(result.users for result in made.results):
                self.operators.remove(made)
                self._disconnect(made, made.values())

    def replace(
        self,
        operator: Operator,
        function: Any,
        *args: Any,
        absorbed: Operator | None = None,
        **kwargs: Any,
    ) -> Operator:
        """Replace ``operator`` by another function that computes its results.

        Args:
            absorbed: an operator that the function contains, and whose path it gets.
        """
        before = absorbed or operator
        results, several = operator.results, operator.returns_list
        made = Operator(function, list(args), kwargs, results, several, before.path)
        made.rewrites = self._noted(before, operator)
        self.operators[self.operators.index(operator)] = made
        self._connect(made)
        self._disconnect(operator, operator.values())
        return made

    def change(self, operator: Operator, function: Any = None) -> None:
        """Note that the present rewrite changed an operator, or gave it another function."""
        self.changed = True
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
            known = mapped(Value, lambda v: v.constant, args)
            made = Value.of_constant(function(*known))
            made.origin = Origin(function, args, {})
            return made
        if shape is None:
            shape = function(*on_meta(args)).shape
        result = Value(torch.Size(shape), values[0].dtype)
        added = Operator(function, list(args), {}, [result], path=operator.path)
        added.rewrites = self._noted(operator)
        self.operators.insert(self.operators.index(operator), added)
        self._connect(added)
        return result

    def substitute(self, value: Value, by: Value) -> None:
        """Let everything that reads ``value`` read another one, which is computed before it."""
        for user in dict.fromkeys(value.users):
            before = list(user.values())
            user.args, user.kwargs = mapped(
                Value, lambda v: by if v is value else v, (user.args, user.kwargs)
            )
            self._connect(user)
            self._disconnect(user, before)

    def __call__(self, *inputs: Tensor) -> Any:
        """The result of the recorded call for inputs of the same shapes and dtypes."""
        tensors: dict[Value, Tensor] = dict(zip(self.sources, inputs, strict=True))
        unread = Counter[Value]()  # tensors are freed after their last use

        def tensor(value: Value) -> Tensor:
            return tensors[value] if value.constant is None else value.constant

        for operator in self.operators:
            args, kwargs = mapped(Value, tensor, (operator.args, operator.kwargs))
            tensors.update(zip(operator.results, operator(args, kwargs), strict=True))
            unread.update({value: len(value.users) for value in operator.results})
            unread.subtract(operator.values())
            for value in (*operator.values(), *operator.results):
                if unread[value] == 0:
                    tensors.pop(value, None)
        return mapped(Value, tensor, self.outputs)

    def __str__(self) -> str:
        """One line per operator."""
        names = {id(source): f"input{i or ''}" for i, source in enumerate(self.sources)}
        lines = []
        for operator in self.operators:
            given = mapped(
                Value, lambda v: names.get(id(v), "constant"), (operator.args, operator.kwargs)
            )
            for value in operator.results:
                names[id(value)] = f"%{len(names) - len(self.sources)}"
            args = [str(a) for a in given[0]] + [f"{k}={v}" for k, v in given[1].items()]
            made = ", ".join(names[id(v)] for v in operator.results)
            lines.append(f"{made} = {operator.name}({', '.join(args)})")
        result = mapped(Value, lambda v: names.get(id(v), "constant"), self.outputs)
        return "\n".join([*lines, f"return {result}"])


def by_name(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operator of ATen by name, with defaults for those not given."""
    arguments = function._schema.arguments
    defaults = {a.name: a.default_value for a in arguments}
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def on_meta(given: Any) -> Any:
    """Arguments with tensors without memory in place of values."""
    return mapped(Value, lambda v: torch.empty(v.shape, dtype=v.dtype, device="meta"), given)


def permuted(value: Any, order: list[int]) -> Value | None:
    """What a value is a permutation of in this order, if it is one."""
    match value:
        case Value(_aten.permute.default, [Value() as whole, axes]) if list(axes) == order:
            return whole
    return None


def is_available(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether a kernel computes tensors of a dtype on the CPU, where rewritten calls run."""
    return kernel.unavailable(torch.device("cpu"), dtype) is None
