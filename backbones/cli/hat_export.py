"""Fast export of HAT, whose groups differ only in their weights.

torch.export and torch.onnx take hundredths of a second per node, and HAT-L has 7000 nodes. Instead,
one group is traced and translated with its weights as inputs, and copied for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.hat.blocks import ResidualGroup

_DOMAIN, _OPERATOR = "backbones", "Group"


class Placeholder(nn.Module):
    """Placeholder for a group; a custom node in ONNX."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_OPERATOR}",
            (x,),
            {"number": self.number},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


class SharedGroup(nn.Module):
    """The function that a model's groups share: (x, weights by name) → output.

    Attributes:
        weights: of each group, by name.
        dim: channels.
        window_size: the sides of maps are multiples of it.
    """

    def __init__(self, groups: Sequence[ResidualGroup]) -> None:
        super().__init__()
        self._group = (groups[0],)  # hidden: its weights are inputs
        self.weights: list[dict[str, Tensor]] = [_weights(group) for group in groups]
        self.dim: int = groups[0].conv.in_channels
        self.window_size = groups[0].window_size

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(self._group[0], weights, (x,))
        return out


def extract_group(model: nn.Module) -> SharedGroup | None:
    """Replace identical groups by placeholders; None if there are none.

    Args:
        model: changed in place.
    """
    stages: Any = getattr(model, "stages", ())
    if len(stages) < 2 or not all(isinstance(stage, ResidualGroup) for stage in stages):
        return None
    if any(_structure(stage) != _structure(stages[0]) for stage in stages):
        return None
    group = SharedGroup(list(stages))
    for number in range(len(stages)):
        stages[number] = Placeholder(number)
    return group


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def _structure(module: nn.Module) -> Any:
    """Equal for modules with equal graphs; ignores stochastic depth, a no-op in eval mode."""
    layers = [
        (name, type(layer), layer.extra_repr())
        for name, layer in module.named_modules()
        if not isinstance(layer, DropPath)
    ]
    tensors = [(name, t.shape, t.dtype) for name, t in _weights(module).items()]
    return layers, tensors


def inline_groups(model: Any, group: Any, weights: Sequence[dict[str, Tensor]]) -> None:
    """Replace the placeholders by copies of a group's nodes.

    Args:
        model: ``onnx_ir.Model`` with placeholders; changed in place.
        group: ``onnx_ir.Model`` of a :class:`SharedGroup`, its inputs are the map and the weights.
        weights: of each placeholder, in the order of the inputs.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedOpsetsPass

    graph = model.graph
    tables = {}  # the same for all
    for value in group.graph.initializers.values():
        tables[value] = _initializer(graph, f"group.{value.name}", value.const_value)
    for placeholder in [node for node in graph if node.domain == _DOMAIN]:
        number = placeholder.attributes["number"].as_int()
        values = dict(tables)
        image, *inputs = group.graph.inputs
        values[image] = placeholder.inputs[0]
        for value, (name, tensor) in zip(inputs, weights[number].items(), strict=True):
            name = f"stages.{number}.{name}"
            values[value] = _initializer(graph, name, onnx_ir.tensor(tensor, name=name))
        for node in group.graph:
            copy = onnx_ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else values[value] for value in node.inputs],
                node.attributes,
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"stages.{number}.{node.name}",
            )
            for value, copied in zip(node.outputs, copy.outputs, strict=True):
                copied.name = f"stages.{number}.{value.name}"
                copied.type = value.type
                values[value] = copied
            graph.insert_before(placeholder, copy)
        (output,) = group.graph.outputs
        onnx_ir.convenience.replace_all_uses_with(placeholder.outputs[0], values[output])
        graph.remove(placeholder, safe=True)
    RemoveUnusedOpsetsPass()(model)


def _initializer(graph: Any, name: str, tensor: Any) -> Any:
    """A new constant of a graph."""
    import onnx_ir

    value = onnx_ir.Value(
        name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
