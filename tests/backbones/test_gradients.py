"""Gradients of an image do not depend on its batch, and agree with central differences."""

from __future__ import annotations

from pathlib import Path

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
    quick_cases,
    shared_gradients,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import FAMILIES, small

from ops.batch_norm import BatchNorm2d

QUICK = quick_cases()
SLOW = [case for case in cases(FAMILIES, PRECISIONS) if case not in QUICK]


def name_of(case: Case) -> str:
    return "-".join(case)


def check(case: Case) -> None:
    objective = Objective(case)
    x = pictures(case)
    with case.autocast():
        whole = gradients(objective, x, objective)
        assert_same(alone(objective, x, objective), whole, case, objective)


@pytest.mark.parametrize("case", QUICK, ids=name_of)
def test_alone_as_in_a_batch(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=name_of)
def test_alone_as_in_a_batch_in_the_other_modes(case):
    check(case)


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


def check_shared(wanted: list[Case], folder: Path) -> None:
    for case, shared in zip(wanted, shared_gradients(wanted, folder), strict=True):
        objective = Objective(case)
        with case.autocast():
            whole = gradients(objective, pictures(case), objective)
        assert shared.keys() == whole.keys()
        assert_same(shared, whole, case, objective)


def test_a_batch_of_one_in_each_of_two_processes(tmp_path):
    check_shared([Case(family, "frozen") for family in ("efficientvit", "shvit")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_one_in_each_of_two_processes_in_every_mode(family, tmp_path):
    check_shared(list(cases([family], PRECISIONS)), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_of_maps_is_ours(family):
    norms = [module for module in small(family).modules() if isinstance(module, _BatchNorm)]
    assert all(isinstance(norm, BatchNorm2d | nn.BatchNorm1d) for norm in norms)
    assert bool(norms) is (family not in NO_BATCH_STATISTICS)
