"""A program: the operators of a graph as a function of its input."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ops.rewriting.graph import OperatorGraph, Value

__all__ = ["Program"]


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
