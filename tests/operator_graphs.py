"""Modules whose forward is a function, and what recording and rewriting make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ops.fuse.calls import Calls
from ops.rewriting.graph import OperatorGraph

_VIEWS = ("permute", "reshape", "transpose", "flatten", "view", "unbind", "select")

IMAGE = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(0))
TOKENS = IMAGE.flatten(2).transpose(1, 2).contiguous()


class Call(nn.Module):
    """A module of layers whose forward is a function of them and of the input."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, -1.5, -0.5)
                nn.init.normal_(m.bias)
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def graph_of(model: nn.Module, x: Tensor) -> OperatorGraph:
    """Rewritten."""
    torch.manual_seed(0)
    with torch.no_grad():
        return Calls().graph(_Plain(model.eval()), _call, x)


class _Plain:
    """A module in place of a fused one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.named_modules = model, model.named_modules

    def run(self, _: Any, x: Tensor) -> Any:
        return self.model(x)


def _call() -> None:
    """Stands for a method."""


def names_of(graph: OperatorGraph) -> list[str]:
    """The operators that compute something."""
    names = [operator.name.removeprefix("aten.").partition(".")[0] for operator in graph.operators]
    return [name for name in names if name not in _VIEWS]


def assert_left(model: nn.Module, x: Tensor, *expected: str) -> None:
    """Assert which operators are left, and that they compute what the model does."""
    graph = graph_of(model, x)
    assert names_of(graph) == list(expected), str(graph)
    for image in (x, torch.randn_like(x)):
        with torch.no_grad():
            found, plain = graph(image), pytree.tree_leaves(model(image))
        half = plain[0].dtype == torch.bfloat16
        torch.testing.assert_close(found, plain, rtol=2**-7 if half else 1e-5, atol=1e-5)
