"""The rewrites of a graph, in their order."""

from __future__ import annotations

from collections.abc import Callable

from ops.rewriting.branches import merge_branches
from ops.rewriting.epilogues import (
    add_shortcut,
    apply_activation,
    apply_gates,
    fold_norm,
    fold_scale,
    multiply_by_map,
    split_gated_linear,
)
from ops.rewriting.feed_forward import join_expansion, join_feed_forward
from ops.rewriting.gates import add_gated_linear, join_channel_gates
from ops.rewriting.graph import Operator, OperatorGraph
from ops.rewriting.lift import lift
from ops.rewriting.response_norm import (
    join_response_norm,
    join_response_scales,
    join_squeeze,
)
from ops.rewriting.softmax import join_mixes, join_softmax
from ops.rewriting.stem import join_stem
from ops.rewriting.views import join_permutations, sink_permutation, unfold_map
from ops.rewriting.windows import join_windows

__all__ = ["rewrite"]

Rewrite = Callable[[OperatorGraph, Operator], None]

# Each group is applied until nothing changes. Branches are merged before permutations hide them.
# Folding comes before epilogues, since a layer with an activation cannot be folded any more.
_GROUPS: tuple[tuple[Rewrite, ...], ...] = (
    (lift,),
    (join_windows,),
    (unfold_map,),
    (join_permutations, fold_norm, merge_branches, fold_scale),
    (join_permutations, sink_permutation, fold_norm, fold_scale),
    (
        *(join_permutations, sink_permutation, split_gated_linear, apply_activation),
        *(add_shortcut, multiply_by_map, apply_gates),
    ),
    (join_channel_gates,),
    (add_gated_linear,),
    (join_response_norm,),
    (join_response_scales, join_squeeze, join_feed_forward),
    (join_expansion,),
    (join_permutations,),
    (join_permutations, join_softmax, join_stem),
    (join_mixes,),
)


def rewrite(graph: OperatorGraph) -> None:
    """Rewrite a graph in place with fewer and faster operators."""
    for group in _GROUPS:
        graph.changed = True
        while graph.changed:
            graph.changed = False
            for operator in list(graph.operators):
                for apply in group:
                    if operator in graph.operators:
                        graph.rewrite = apply.__name__.replace("_", " ")
                        apply(graph, operator)
