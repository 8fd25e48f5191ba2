"""Time of a call by kind of operator, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS, DEPTHWISE, CONVOLUTIONS = "matrix products", "depthwise conv", "other conv"
ATTENTION, NORMS, ELEMENTWISE = "attention", "norms", "elementwise"
MOVES, OTHERS, PYTHON = "moving data", "other operators", "outside operators"
KINDS = (*(PRODUCTS, DEPTHWISE, CONVOLUTIONS, ATTENTION, NORMS, ELEMENTWISE, MOVES, OTHERS), PYTHON)

# The first pattern that matches an operator's name (without library) decides; convolutions are
# classified by the shape of their weight. Operators that only call others are expanded.
_PATTERNS = {
    ATTENTION: r"scaled_dot_product|attention|na_cpu|natten|neighborhood",
    PRODUCTS: r"(depthwise|packed|response)_mlp|kan_layer|linear$|_linear_pointwise|matmul$|addmm"
    r"|mm$|einsum",
    DEPTHWISE: r"depthwise",
    CONVOLUTIONS: r"_stem$",
    NORMS: r"(layer|batch|group|instance|vector|response)_norm|norm$",
    ELEMENTWISE: r"(add|sub|mul|div|neg|exp|log|sqrt|rsqrt|pow|abs|clamp|square|addcmul|lerp)_?$"
    r"|gelu|relu|silu|sigmoid|hardswish|hardsigmoid|tanh|elu|softmax|where|masked_fill|bitwise"
    r"|(sum|mean|amax|amin|max|min|topk|sort|argmax|var|std)$|pool|dropout|(ge|gt|le|lt|eq|ne)$",
    MOVES: r"copy_|clone|contiguous|cat$|stack$|gather|index|take|roll|pad|reorder|^to$|_to_copy"
    r"|reshape|unfold|im2col|col2im|repeat|flip|pixel_(un)?shuffle|interpolate|upsample|embedding"
    r"|fill_|zeros|ones|arange|scatter|grid_sampl|deform",
}
_CONVOLUTION = re.compile(r"conv(olution|\dd|_transpose)|_convolution_pointwise")


def kind_of(name: str, shapes: list[Any]) -> str | None:
    """The kind of an operator; None if no pattern matches its name."""
    short = name.split("::")[-1]
    if _CONVOLUTION.search(short) and "depthwise" not in short:
        weight = shapes[1] if len(shapes) > 1 else []
        if len(weight) < 3:
            return CONVOLUTIONS
        if weight[1] == 1 and weight[0] > 1 and shapes[0][1] > 1:
            return DEPTHWISE
        return PRODUCTS if all(side == 1 for side in weight[2:]) else CONVOLUTIONS
    return next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, short)), None)


def time_by_kind(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of a call, in the order of KINDS; they add up to 1.

    A 1×1 convolution or a whole feed-forward counts as a matrix product. ``outside operators`` is
    the time between them: Python and the profiler itself, so it is an upper bound.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    roots = [event for event in profiler.events() if event.cpu_parent is None]
    spent = dict.fromkeys(KINDS, 0.0)

    def visit(event: Any) -> None:
        kind = kind_of(event.name, event.input_shapes)
        if kind is not None:
            spent[kind] += event.cpu_time_total
        elif event.cpu_children:
            spent[OTHERS] += event.self_cpu_time_total
            for child in event.cpu_children:
                visit(child)
        else:
            spent[OTHERS] += event.self_cpu_time_total

    for event in roots:
        visit(event)
    begun = min(event.time_range.start for event in roots)
    total = max(event.time_range.end for event in roots) - begun
    spent[PYTHON] = max(0.0, total - sum(spent.values()))
    whole = sum(spent.values())
    return {kind: share / whole for kind, share in spent.items()}
