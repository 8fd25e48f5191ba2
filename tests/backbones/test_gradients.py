"""Gradients of an image do not depend on its batch, and agree with central differences."""

from __future__ import annotations

import pytest
import torch
from gradient_law import (
    FORMATS,
    NO_BATCH_STATISTICS,
    PRECISIONS,
    Case,
    Objective,
    alone,
    assert_same,
    cases,
    gradients,
    pictures,
)
from torch import Tensor
from zoo import FAMILIES

# One a family in either memory format is quick.
CASES = [
    pytest.param(
        case,
        id="-".join(case),
        marks=() if case.mode != "frozen" and case.precision == "float32" else pytest.mark.slow,
    )
    for case in cases(FAMILIES, PRECISIONS)
]


@pytest.mark.parametrize("case", CASES)
def test_alone_as_in_a_batch(case):
    objective = Objective(case)
    x = pictures(case)
    with case.autocast():
        whole = gradients(objective, x, objective)
        assert_same(alone(objective, x, objective), whole, case, objective)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_central_differences(family, memory_format):
    """Along a direction in which images and every parameter count."""
    mode = "train" if family in NO_BATCH_STATISTICS else "frozen"
    case = Case(family, mode, memory_format, "float64")
    objective = Objective(case)
    x = pictures(case, 1)
    found = gradients(objective, x, objective)
    values = {n: p.detach() for n, p in objective.named_parameters() if n in found}
    generator = torch.Generator().manual_seed(5)
    moves = {}
    for name, gradient in found.items():
        move = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        size = x.norm() if name == "images" else values[name].norm()
        moves[name] = move * (size / move.norm())

    @torch.no_grad()
    def moved(step: float) -> Tensor:
        for name, value in values.items():
            value.add_(moves[name], alpha=step)
        out = objective(x + step * moves["images"])
        for name, value in values.items():
            value.sub_(moves[name], alpha=step)
        return out

    step = 1e-6
    slopes = torch.stack([(gradient * moves[name]).sum() for name, gradient in found.items()])
    error = (moved(step) - moved(-step)) / (2 * step) - slopes.sum()
    assert error.abs() <= 1e-6 * slopes.abs().sum()
