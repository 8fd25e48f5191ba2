"""The door through Dynamo: graphs that torch captures, with its guards, on this engine's kernels.

:func:`compile_graph` is what ``torch.compile(model, backend="backbones")`` calls, and what fused
modules use themselves where a recording proves nothing. No compiler stands behind it: a graph is
recorded in its first call, as a function of its inputs, and then rewritten and replayed.
"""

from __future__ import annotations

import collections
import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import ShortenTraceback

from ops.fuse.calls import Calls
from ops.fuse.guards import Guards, is_trusted

__all__ = ["InvalidOptionError", "compile_graph", "compiled", "unavailable_reason"]

_log = logging.getLogger(__name__)

_FEWEST_OPERATORS = 3  # of a graph that is recorded
_CALLS_CLEANED = 8  # of a method, after which Dynamo captures rarely
_MARK = "_dynamo_static_input_type"  # an attribute of tensors
# What fused modules ask of Dynamo beyond its defaults, all of which trade truth for speed.
_STRICT = {
    "suppress_errors": True,  # what Dynamo itself fails at runs plainly
    "rewrite_assert_with_torch_assert": False,  # which raises something else
    "skip_nnmodule_hook_guards": False,
    "skip_no_tensor_aliasing_guards_on_parameters": False,
    "assume_dunder_attributes_remain_unchanged": False,
}
# Layers with a fast path in C++, which Dynamo doesn't take: where all of a row, or the end of a
# sequence, is masked, the results of the other path differ.
_OTHERWISE = (nn.TransformerEncoder, nn.MultiheadAttention)
# Attributes of tensors that Dynamo gets wrong: it runs NumPy's writes while it captures, takes
# addresses for constants, and does not see that memory is another.
_MISTAKEN = {"numpy", "data_ptr", "data", "untyped_storage", "from_numpy", "from_dlpack", "set_"}
# Functions whose cache it leaves out, arrays that it writes twice, deques whose length it forgets.
_MISTAKEN_KINDS = (type(functools.cache(int)), np.ndarray, collections.deque)


class InvalidOptionError(ShortenTraceback, ValueError):
    """What ``torch.compile`` was given is not an option of this backend.

    Dynamo hands errors of its own kind to the user as they are, and wraps all others.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class _Graph:
    """A captured graph, called with its inputs, of which some are weights.

    Weights may be replaced between calls, which Dynamo's guards don't see: calls with other weights
    are of another kind.

    Args:
        weights: their numbers among the inputs.
        scalars: those of tensors that stand for a number.
        owner: gives the module that the graph is of, if known.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        weights: Sequence[int],
        scalars: Sequence[int],
        owner: Callable[[], Any],
    ) -> None:
        self._graph, self._weights, self._owner = graph, weights, owner
        self._scalars = scalars
        self._calls = Calls()

    def __call__(self, *args: Any) -> Any:
        if self._scalars:
            args = tuple(a.item() if i in self._scalars else a for i, a in enumerate(args))
        if torch.compiler.is_compiling():
            return self._graph.forward(*args)
        weights = {i: args[i] for i in self._weights}
        free = tuple(a for i, a in enumerate(args) if i not in weights)
        bound = Bound(self._graph.forward, weights, self._owner)
        return self._calls(bound, _forward, free, {}, tuple(map(id, weights.values())))

    def forget(self) -> None:
        """Drop all recordings."""
        self._calls = Calls()


class Bound:
    """A graph with its weights, in place of a module.

    Attributes:
        weights: by their numbers among the graph's inputs.
    """

    def __init__(
        self, function: Callable[..., Any], weights: Mapping[int, Tensor], owner: Any
    ) -> None:
        self._function, self.weights, self._owner = function, weights, owner

    def run(self, method: Callable[..., Any], *free: Any) -> Any:
        """The graph's outputs for its other inputs."""
        following = iter(free)
        count = len(free) + len(self.weights)
        args = [self.weights[i] if i in self.weights else next(following) for i in range(count)]
        return self._function(*args)

    def named_modules(self) -> Any:
        """Those of the module that the graph is of, if known."""
        owner = self._owner()
        return iter(()) if owner is None else owner.named_modules()


def _forward(graph: Bound, *free: Any) -> Any:
    """Stands for a graph's call."""
    return graph.run(_forward, *free)


def compile_graph(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    owner: Callable[[], Any] = lambda: None,
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="backbones")``.

    With ``dynamic=True``, a graph serves any size, each of which is recorded and replayed.

    Args:
        graph: as Dynamo captures it.
        example_inputs: its inputs; those that are parameters or buffers are weights.
        mode: only ``"default"``.
        options: none are known.
        owner: gives the module that the graph is of, for layers in int8.

    Raises:
        InvalidOptionError: another mode, or options.
    """
    if mode not in (None, "default"):
        raise InvalidOptionError(
            f"backend 'backbones' has no mode {mode!r}: it compiles nothing, so that there is only "
            "'default'"
        )
    if options:
        raise InvalidOptionError(
            f"backend 'backbones' has no options, got {', '.join(map(repr, options))}; for "
            "bfloat16 or int8, use backbones.fuse(model, dtype=…)"
        )
    nodes = [*graph.graph.nodes]
    if sum(node.op in ("call_function", "call_method") for node in nodes) < _FEWEST_OPERATORS:
        return graph.forward
    placeholders = [node for node in nodes if node.op == "placeholder"]
    scalars = [i for i, node in enumerate(placeholders) if _become_number(node)]
    if scalars:
        graph.recompile()
    given = zip(placeholders, example_inputs, strict=True)
    weights = [i for i, (node, x) in enumerate(given) if _is_weight(node, x)]
    made = _Graph(graph, [i for i in weights if i not in scalars], scalars, owner)
    return made.__call__  # without attributes, which Dynamo would copy


def _become_number(placeholder: Any) -> bool:
    """Let a graph take a number where it takes a tensor of which it only asks that.

    So come Python's numbers, such as the ``eps`` of norms, with ``dynamic=True``.
    """
    users = [*placeholder.users]
    if not users or any((user.op, user.target) != ("call_method", "item") for user in users):
        return False
    for user in users:
        user.replace_all_uses_with(placeholder)
        user.graph.erase_node(user)
    return True


def _is_weight(node: Any, example: Any) -> bool:
    noted = node.meta.get("tensor_dict") or {}
    return isinstance(example, nn.Parameter) or _MARK in noted


@functools.cache
def unavailable_reason() -> str | None:
    """Why Dynamo can't be used here; None if it can."""
    try:
        from torch._dynamo.eval_frame import check_if_dynamo_supported

        check_if_dynamo_supported()
    except Exception as error:  # a Python that is too new
        _log.warning("torch's Dynamo is not available, so some calls run plainly: %s", error)
        return str(error)
    return None


def _obstacle(module: nn.Module, frames: Mapping[types.CodeType, dict[str, Any]]) -> str | None:
    """Why what Dynamo makes of a module may be something else; None if it is the same."""
    found = next((type(m).__name__ for m in module.modules() if isinstance(m, _OTHERWISE)), None)
    if found is not None:
        return f"Dynamo computes masked rows of {found} otherwise"
    holders: list[Mapping[str, Any]] = [vars(m) for m in module.modules()]
    holders += [vars(k) for k in {k for m in module.modules() for k in type(m).__mro__}]
    for code, variables in frames.items():
        if is_trusted(code.co_filename):
            continue
        if mistaken := _MISTAKEN & {*code.co_names}:
            return f"Dynamo may get {min(mistaken)} wrong"
        for name in code.co_names:
            for held in (variables, *holders):
                if isinstance(held.get(name), _MISTAKEN_KINDS):
                    return f"Dynamo may get {name} wrong, a {type(held[name]).__name__}"
            if variables.get(name) is np:
                return "Dynamo computes NumPy otherwise"
    return None


class compiled:  # noqa: N801  (a function with a count)
    """A method whose calls Dynamo captures.

    Args:
        method: a function of a module and arguments.
        frames: code that a call ran, with its globals.

    Attributes:
        obstacle: why Dynamo can't be trusted with it, if so.
        guards: of global variables and classes, beside Dynamo's own.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        module: nn.Module,
        frames: Mapping[types.CodeType, dict[str, Any]],
    ) -> None:
        self.guards = Guards(None)
        self.guards.watch_code(frames)
        self.guards.watch({type(m) for m in module.modules()})
        self.obstacle = self.guards.failure or _obstacle(module, frames)
        owner: Any = weakref.ref(module)
        self._owner = owner
        made: list[Callable[..., Any]] = []  # without this object, to avoid a cycle
        self._made = made
        self._calls = 0

        def compile_own(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            _remove_marks(inputs)
            made.append(compile_graph(graph, inputs, owner=owner))
            return made[-1]

        self._method = torch.compile(_copied(method), backend=compile_own, dynamic=False)
        weakref.finalize(self, _forget, made).atexit = False

    @property
    def graphs(self) -> int:
        """The number of graphs captured so far."""
        return len(self._made)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.graphs
        try:
            with torch._dynamo.config.patch(_STRICT):
                return self._method(*args, **kwargs)
        finally:
            if self.graphs != before or self._calls < _CALLS_CLEANED:
                self._calls += 1
                _remove_marks(v for m in self._owner().modules() for v in _tensors_of(m))


def _forget(made: list[Callable[..., Any]]) -> None:
    """Drop what belongs to graphs that Dynamo may keep."""
    for graph in made:
        if isinstance(called := getattr(graph, "__self__", None), _Graph):
            called.forget()
    made.clear()


def _tensors_of(module: nn.Module) -> Iterable[Any]:
    return *module._parameters.values(), *module._buffers.values(), *vars(module).values()


def _remove_marks(tensors: Iterable[Any]) -> None:
    """Remove what Dynamo leaves behind on tensors, for compilers that we don't use."""
    for t in tensors:
        if isinstance(t, Tensor) and vars(t).get(_MARK) == "unguarded":  # not the user's
            delattr(t, _MARK)


def _copied(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function with code of its own.

    What Dynamo captures belongs to code, and is limited in number: so each module has its own
    captures, which go with it.
    """
    if not isinstance(method, types.FunctionType):
        return method
    code = method.__code__.replace()
    made = types.FunctionType(
        code, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    made.__kwdefaults__, made.__qualname__ = method.__kwdefaults__, method.__qualname__
    vars(made).update(vars(method))
    return made
