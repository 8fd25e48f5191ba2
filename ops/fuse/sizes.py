"""One graph for every size, made of the graphs of a few.

The rewritten graphs of a few sizes are laid side by side. Where they differ in integers, these
become expressions of the inputs' sizes (:mod:`ops.fuse.expressions`); constants that differ are
computed once a size, as the recorded call computed them. Everything that the calls did, with the
shapes and strides of all results, is their law: what a call at another size has to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import unseen
from ops.fuse.expressions import Expressions
from ops.fuse.nested import leaves
from ops.fuse.structure import Structure
from ops.rewriting.graph import OperatorGraph, Value

__all__ = ["SIZES_RECORDED", "Case", "Group", "Size", "SizedGraph"]

SIZES_RECORDED = 3  # before there is one graph, or none is to be expected
_MOST_SIZES = 6  # of a case: other ones vary in more than the first
_MOST_CASES = 8
_SMALL = 2  # the largest size that may be one elsewhere


class DifferentError(Exception):
    """Graphs of several sizes are not one."""


class Law:
    """What calls at several sizes have in common, as their signatures say.

    Args:
        sizes: of each call, all sizes of its inputs.
        signatures: of the recordings.

    Raises:
        DifferentError: the calls do different things.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], signatures: Sequence[Any]) -> None:
        self.expressions = Expressions([*zip(*sizes, strict=True)])
        taken = [_taken_apart(signature) for signature in signatures]
        self._skeleton, first = taken[0]
        if any(skeleton != self._skeleton for skeleton, _ in taken):
            raise DifferentError("calls of several sizes differ in their operators")
        self._integers: list[int] = first  # or, of those that vary, what is below
        self._varying: list[tuple[int, int]] = []  # their places, and the numbers of expressions
        for place, samples in enumerate(zip(*(integers for _, integers in taken), strict=True)):
            if any(s != samples[0] for s in samples):
                number = self.expressions.number_of(samples)
                if number is None:
                    raise DifferentError(f"no expression of the input's sizes gives {samples}")
                self._varying.append((place, number))

    def allows(self, size: Size, signature: Any) -> bool:
        """Whether a call did at a size what it has to do."""
        skeleton, integers = _taken_apart(signature)
        if skeleton != self._skeleton:
            return False
        expected = [*self._integers]
        for place, number in self._varying:
            expected[place] = size.integers[number]
        return integers == expected

    def is_usual(self, size: Size) -> bool:
        """Whether no integer gets so small that it is a size that broadcasts, or none."""
        varying = {number for _, number in self._varying}
        samples = self.expressions.samples
        return all(size.integers[n] > _SMALL or size.integers[n] in samples[n] for n in varying)


class Size:
    """What depends on the sizes of a call's inputs.

    Attributes:
        integers: by the numbers of their expressions.
        constants: made so far, by their numbers.
    """

    def __init__(self, integers: list[int]) -> None:
        self.integers = integers
        self.constants: dict[int, Any] = {}

    def constant(self, number: int, make: Callable[[], Any]) -> Any:
        """A constant, made once."""
        if number not in self.constants:
            self.constants[number] = make()
        return self.constants[number]

    @property
    def nbytes(self) -> int:
        """The memory of the constants."""
        return sum(t.nbytes for t in leaves([*self.constants.values()]) if isinstance(t, Tensor))


class SizedGraph:
    """The operators of a call for inputs of any size that its law covers.

    Args:
        graphs: rewritten, in the order of the law's calls. Equal layers are the same objects.
        structures: of the calls' results.
        law: of the calls.

    Attributes:
        source: the code that runs them.
        is_free: whether no number in it depends on the size.

    Raises:
        DifferentError: what differs is not known to depend on the size.
    """

    def __init__(
        self, graphs: Sequence[OperatorGraph], structures: Sequence[Structure], law: Law
    ) -> None:
        self._expressions = law.expressions
        self._structure = structures[0]
        shapes = [[value.shape for value in graph.outputs] for graph in graphs]
        self._places = _join_structures(structures, shapes, law.expressions)
        writer = _Writer(graphs, law.expressions)
        self.source, self._run = writer.source, writer.function
        dense = all(order is not None for *_, order in self._places)
        self.is_free = dense and not writer.has_integers

    def size(self, sizes: Sequence[int]) -> Size:
        """What depends on the sizes of inputs."""
        return Size(self._expressions.evaluate(sizes))

    def structure(self, size: Size, results: Sequence[Tensor]) -> Structure:
        """The structure of the result at a size."""
        integers, places = size.integers, []
        for (stride, offset, order), t in zip(self._places, results, strict=True):
            if order is not None:
                stride = _dense(t.shape, order)
            else:
                stride = tuple(_value(s, integers) for s in stride)
            places.append((stride, _value(offset, integers)))
        return self._structure.laid_out(places)

    def __call__(self, size: Size, *inputs: Tensor) -> list[Tensor]:
        """The results of the graph."""
        made: list[Tensor] = self._run(size, *inputs)
        return made


class _Expression(int):
    """The number of an expression, in place of an integer."""


def _value(integer: int, integers: Sequence[int]) -> int:
    return integers[integer] if type(integer) is _Expression else integer


def _joined(samples: tuple[int, ...], expressions: Expressions, what: str) -> int:
    if all(s == samples[0] for s in samples):
        return samples[0]
    number = expressions.number_of(samples)
    if number is None:
        raise DifferentError(f"no expression of the input's sizes gives {what}, {samples}")
    return _Expression(number)


def _join_structures(
    structures: Sequence[Structure],
    shapes: Sequence[Sequence[torch.Size]],
    expressions: Expressions,
) -> list[tuple[tuple[int, ...], int, list[int] | None]]:
    """Strides and offsets of the results that vary, with expressions, and the order of dense ones.

    Args:
        shapes: of these results, for each structure.
    """
    for several in zip(*(structure.parts for structure in structures), strict=True):
        fixed = [part.tensor for part in several]
        if fixed[0] is not None and not all(_is_equal(fixed[0], t) for t in fixed[1:]):
            raise DifferentError("a result that depends on no value depends on the size")
    places = []
    varying = [structure.varying for structure in structures]
    for parts, of_parts in zip(zip(*varying, strict=True), zip(*shapes, strict=True), strict=True):
        strides = zip(*(part.stride for part in parts), strict=True)
        stride = tuple(_joined(s, expressions, "a result's stride") for s in strides)
        offset = _joined(tuple(part.offset for part in parts), expressions, "a result's offset")
        places.append((stride, offset, _order([part.stride for part in parts], of_parts)))
    return places


def _order(strides: Sequence[tuple[int, ...]], shapes: Sequence[Sequence[int]]) -> list[int] | None:
    """The order of axes in memory, if tensors with these strides are dense."""
    order = sorted(range(len(strides[0])), key=lambda axis: -strides[0][axis])
    dense = all(_dense(n, order) == s for n, s in zip(shapes, strides, strict=True))
    return order if dense else None


def _dense(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor whose axes are in this order in memory."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)


class _Writer:
    """Writes the code of a graph from those of several sizes."""

    def __init__(self, graphs: Sequence[OperatorGraph], expressions: Expressions) -> None:
        self._expressions = expressions
        self._scope: dict[str, Any] = {}
        self._names: dict[Value, str] = {}  # of all graphs
        self._constants = 0  # that depend on the size
        self._kept: set[str] = set()
        self._lines: list[tuple[str, list[str], bool]] = []  # code, results, several
        self._where = ""
        self.has_integers = False
        lists = [graph.operators for graph in graphs]
        if len({len(operators) for operators in lists}) > 1:
            raise DifferentError("sizes are rewritten to other operators")
        sources = [self._learn(v) for v in zip(*(g.sources for g in graphs), strict=True)]
        for operators in zip(*lists, strict=True):
            self._write(operators)
        outputs = self._code(tuple(graph.outputs for graph in graphs))
        self.source = self._assemble(sources, outputs)
        exec(self.source, self._scope)
        self.function: Callable[..., Any] = self._scope["run"]

    def _learn(self, values: Sequence[Value]) -> str:
        name = f"v{len({*self._names.values()})}"
        for value in values:
            self._names[value] = name
        return name

    def _bind(self, constant: Any) -> str:
        name = f"c{len(self._scope)}"
        self._scope[name] = constant
        return name

    def _write(self, operators: Sequence[Any]) -> None:
        first = operators[0]
        self._where = first.name
        if any(other.function is not first.function for other in operators):
            names = sorted({other.name for other in operators})
            raise DifferentError(f"sizes are rewritten to other operators: {' and '.join(names)}")
        if any(other.kwargs.keys() != first.kwargs.keys() for other in operators):
            raise DifferentError(f"sizes are rewritten to other arguments of {first.name}")
        args = [self._code(parts) for parts in zip(*(o.args for o in operators), strict=True)]
        args += [
            f"{name}={self._code(tuple(o.kwargs[name] for o in operators))}"
            for name in first.kwargs
        ]
        code = f"{self._bind(first.function)}({', '.join(args)})"
        results = [self._learn(v) for v in zip(*(o.results for o in operators), strict=True)]
        self._lines.append((code, results, first.returns_list))

    def _code(self, xs: tuple[Any, ...]) -> str:
        """The code of an argument, given for each size."""
        x = xs[0]
        if isinstance(x, Value):
            return self._value_code(xs)
        if isinstance(x, list | tuple):
            if any(not isinstance(other, list | tuple) or len(other) != len(x) for other in xs):
                raise DifferentError(f"lists of several lengths are arguments of {self._where}")
            inner = [self._code(parts) for parts in zip(*xs, strict=True)]
            return f"[{', '.join(inner)}]"
        if all(type(other) is type(x) and other == x for other in xs):
            return repr(x) if type(x) in (int, bool, type(None)) else self._bind(x)
        if all(type(other) is int for other in xs):
            self.has_integers = True
            number = _joined(xs, self._expressions, f"an argument of {self._where}")
            return f"i[{int(number)}]"
        raise DifferentError(f"an argument of {self._where} depends on the size: {xs}")

    def _value_code(self, xs: tuple[Any, ...]) -> str:
        x = xs[0]
        if x in self._names:
            if any(self._names.get(other) != self._names[x] for other in xs):
                raise DifferentError(f"{self._where} reads other values at other sizes")
            return self._names[x]
        constants = [getattr(other, "constant", None) for other in xs]
        if any(constant is None for constant in constants):
            raise DifferentError(f"{self._where} reads a constant at some sizes only")
        if all(_is_equal(constants[0], other) for other in constants[1:]):
            return self._bind(constants[0])
        return self._constant_code(xs)

    def _constant_code(self, xs: tuple[Any, ...]) -> str:
        """A constant that depends on the size, computed as each was."""
        made = [value.origin for value in xs]
        if None in made or len({(origin.function, origin.index) for origin in made}) > 1:
            raise DifferentError(f"a constant of {self._where} depends on the size")
        first = made[0]
        args = [self._code(parts) for parts in zip(*(o.args for o in made), strict=True)]
        args += [f"{k}={self._code(tuple(o.kwargs[k] for o in made))}" for k in first.kwargs]
        at = "" if first.index is None else f"[{first.index}]"
        call = f"{self._bind(first.function)}({', '.join(args)}){at}"
        name = self._learn(xs)
        self._kept.add(name)
        self._constants += 1
        code = f"size.constant({self._constants}, lambda: {call})"
        self._lines.append((code, [name], False))
        return name

    def _assemble(self, sources: list[str], outputs: str) -> str:
        """The function: what nothing reads any more is freed at once."""
        codes = [code for code, _, _ in self._lines] + [outputs]
        last: dict[str, int] = {}
        for index, code in enumerate(codes):
            last.update(dict.fromkeys(_names_in(code), index))
        made = {**dict.fromkeys(sources, -1)}
        for index, (_, results, _) in enumerate(self._lines):
            made |= dict.fromkeys(results, index)
        lines = [f"def run(size, {', '.join(sources)}):", "    i = size.integers"]
        for index, (code, results, several) in enumerate(self._lines):
            left = ", ".join(results) + ("," if several and len(results) == 1 else "")
            lines.append(f"    {left + ' = ' if results else ''}{code}")
            ends = [n for n in made if last.get(n, made[n]) == index and n not in self._kept]
            if ends:
                lines.append(f"    del {', '.join(ends)}")
        return "\n".join([*lines, f"    return {outputs}"])


def _names_in(code: str) -> list[str]:
    return re.findall(r"\bv\d+\b", code)


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two tensors are the same to the bit."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return False
    with torch.no_grad(), unseen():
        return bool(torch.equal(a, b))


_INTEGER = object()


def _taken_apart(signature: Any) -> tuple[tuple[Any, ...], list[int]]:
    """A signature without its integers, and these."""
    integers: list[int] = []
    return _without(signature, integers), integers


def _without(part: Any, integers: list[int]) -> Any:
    if type(part) is int:
        integers.append(part)
        return _INTEGER
    if isinstance(part, tuple | list):
        return tuple([_without(inner, integers) for inner in part])
    return part


class Case:
    """The recorded calls of several sizes that did the same.

    Attributes:
        law, graph: of them; there is no graph yet of few sizes, or if they can't be one.
        reason: why they can't.
    """

    def __init__(self) -> None:
        self._sizes: list[tuple[int, ...]] = []
        self._recordings: list[Any] = []
        self.law: Law | None = None
        self.graph: SizedGraph | None = None
        self.reason = ""

    def take(self, sizes: tuple[int, ...], recording: Any) -> bool:
        """Add a recording, if it does the same as the others."""
        every = [*self._sizes, sizes], [*self._recordings, recording]
        try:
            law = Law(every[0], [r.signature for r in every[1]])
        except DifferentError as error:
            self.reason = str(error)
            return False
        self._sizes, self._recordings = every
        self.law, self.graph = law, None
        return True

    def __len__(self) -> int:
        return len(self._sizes)

    def join(self, rewritten: Callable[[Any], OperatorGraph]) -> None:
        """Make one graph of all."""
        assert self.law is not None
        recordings = self._recordings
        try:
            graphs = [rewritten(recording) for recording in recordings]
            self.graph = SizedGraph(graphs, [r.structure for r in recordings], self.law)
        except DifferentError as error:
            self.reason = str(error)

    @property
    def is_free(self) -> bool:
        """Whether the graph is right for other sizes because nothing asked for a size."""
        graph, recordings = self.graph, self._recordings
        if graph is None or not graph.is_free:
            return False
        seen = {recording.reads_sizes for recording in recordings}
        same = all(r.divided == recordings[0].divided for r in recordings)
        return False in seen and True not in seen and same


class Group:
    """The calls that differ in the sizes of their inputs alone.

    Attributes:
        cases: in the order of their first calls.
        is_timed, is_slow: whether the graph was compared with a plain call, and was slower.
    """

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self._recorded: set[tuple[int, ...]] = set()
        self.is_timed = self.is_slow = False
        self._failure = ""

    def fail(self, reason: str) -> None:
        """Let each size go on alone, since a graph of several is not right."""
        self._failure, self.cases = reason, []

    @property
    def is_settled(self) -> bool:
        """Whether a size that was not recorded has to come back to be worth it."""
        return len(self._recorded) >= SIZES_RECORDED

    @property
    def sees_sizes(self) -> bool:
        """Whether reads of sizes are to be seen: there are several."""
        return len(self._recorded) > 0

    @property
    def reason(self) -> str:
        """Why a size that never occurred is not computed by a graph of others."""
        failed = next((case.reason for case in self.cases if case.reason), "")
        return self._failure or failed or "Python reads sizes, so that a size has to be observed"

    def proved(self, sizes: tuple[int, ...]) -> tuple[SizedGraph, Size] | None:
        """The graph that is right for a size that never occurred, if that is known."""
        for case in self.cases:
            law, graph = case.law, case.graph
            if law is not None and graph is not None and case.is_free:
                size = graph.size(sizes)
                if law.expressions.covers(sizes) and law.is_usual(size):
                    return graph, size
        return None

    def lacks(self, sizes: tuple[int, ...]) -> bool:
        """Whether a size varies in more than the graph of all sizes was made from."""
        return any(
            case.law is not None
            and case.is_free
            and len(case) < _MOST_SIZES
            and not case.law.expressions.covers(sizes)
            for case in self.cases
        )

    def predicted(self, sizes: tuple[int, ...], recording: Any) -> tuple[SizedGraph, Size] | None:
        """The graph whose law a call at a size obeyed."""
        for case in self.cases:
            law, graph = case.law, case.graph
            if law is not None and graph is not None:
                size = graph.size(sizes)
                if law.expressions.covers(sizes) and law.allows(size, recording.signature):
                    return graph, size
        return None

    def add(self, sizes: tuple[int, ...], recording: Any) -> Case | None:
        """Add a recording. Returns the case that it belongs to, if that has others."""
        if sizes in self._recorded or self._failure:
            return None
        self._recorded.add(sizes)
        for case in self.cases:
            if len(case) < _MOST_SIZES and case.take(sizes, recording):
                return case
        if len(self.cases) < _MOST_CASES:
            self.cases.append(Case())
            self.cases[-1].take(sizes, recording)
        return None
