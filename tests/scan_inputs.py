"""Inputs of gated linear attention and the selective scan, errors of results, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def inputs(
    tokens: int,
    dim: int = 8,
    value_dim: int = 5,
    *,
    back: bool = True,
    bonus: bool = False,
    batch: int = 2,
    heads: int = 3,
    extremes: tuple[float, ...] = (-100.0, 0.0),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Random tensors; about a third of the log gates are replaced by ``extremes``."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, heads, dim)
    query, key = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    value = torch.randn(*shape[:3], value_dim, dtype=torch.float64, generator=generator)
    gates = -2 * torch.rand(2, *shape, dtype=torch.float64, generator=generator)
    for i, extreme in enumerate(extremes):
        gates[torch.rand(gates.shape, generator=generator) < 0.2 / (i + 1)] = extreme
    found = {
        **{"query": query, "key": key, "value": value, "log_gate": gates[0]},
        "log_gate_back": gates[1] if back else None,
        "bonus": torch.randn(heads, dim, dtype=torch.float64, generator=generator)
        if bonus
        else None,
    }
    return {name: t if t is None else t.to(dtype) for name, t in found.items()}


def selective_inputs(
    tokens: int,
    channels: int = 8,
    states: int = 1,
    groups: int = 2,
    *,
    extreme: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Random tensors with steps like those of a network, before a softplus.

    With ``extreme``, a third each of the steps is tiny and large, and some states of each channel
    keep everything or forget at once.
    """
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    batch = 2
    delta, rate = normal(batch, channels, tokens), -normal(channels, states).exp()
    if extreme:
        chosen = torch.rand(delta.shape, generator=generator)
        delta = torch.where(chosen < 1 / 3, -30.0, torch.where(chosen > 2 / 3, 30.0, delta))
        kind = torch.arange(rate.numel()).view(rate.shape) % 3
        rate = torch.where(kind == 0, -1e-9, torch.where(kind == 1, -1e4, rate))
    found = {
        **{"u": normal(batch, channels, tokens), "delta": delta, "A": rate},
        **{name: normal(batch, groups, states, tokens) for name in "BC"},
        **{"D": normal(channels), "delta_bias": normal(channels)},
    }
    return cast(found, dtype)


def map_inputs(
    height: int,
    width: int,
    channels: int = 5,
    states: int = 1,
    rank: int = 3,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """A map for VMamba's four orders, what was projected from it, and parameters."""
    generator = torch.Generator().manual_seed(height * width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    numbers = 4 * (rank + 2 * states)
    found = {
        **{"x": normal(2, height, width, channels)},
        **{"projected": normal(2, height, width, numbers)},
        **{"delta_weight": normal(4, channels, rank), "A": -normal(4 * channels, states).exp()},
        **{"D": normal(4 * channels), "delta_bias": normal(4 * channels)},
    }
    return cast(found, dtype)


def gradients_of(
    function: Callable[..., Tensor], given: dict[str, Any], dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The output and, by argument, gradients of a sum of its random shares."""
    tensors = {n: t.detach().to(dtype).requires_grad_() for n, t in given.items() if t is not None}
    out = function(**tensors, **options)
    generator = torch.Generator().manual_seed(1)
    share = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(dtype)
    gradients = torch.autograd.grad(
        (out * share).sum(), list(tensors.values()), materialize_grads=True, allow_unused=True
    )
    return {"out": out.detach(), **dict(zip(tensors, gradients, strict=True))}


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: t if t is None else t.to(dtype) for name, t in given.items()}


def difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
