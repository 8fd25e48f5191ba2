"""Every variant computes what the published model computes, from the published names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import checkpoint, image, reference, relative_error, summary_error, tolerance, variants
from torch import Tensor
from zoo import SMALL

import backbones

# Above this, a variant is loaded and run only by the slow tests.
QUICK_PARAMS = 15_000_000


def _cases() -> list[Any]:
    """``(family, variant, number of the case)``; the quick ones are small, one size each."""
    cases = []
    for family, variant in variants():
        figures = reference(family, variant)
        quick = figures["params"] <= QUICK_PARAMS and figures["macs"] <= 5e9
        for number in range(len(figures["cases"])):
            slow = () if quick and number == 0 else (pytest.mark.slow,)
            cases.append(pytest.param(family, variant, number, marks=slow))
    return cases


def test_every_variant_is_registered_and_measured() -> None:
    measured = {variant for _, variant in variants()}
    assert measured <= set(backbones.list_models())
    assert {family for family, _ in variants()} == set(backbones.list_families())
    assert set(SMALL) == set(backbones.list_families())


@pytest.mark.parametrize(("family", "variant"), variants())
def test_parameter_count(family: str, variant: str) -> None:
    with torch.device("meta"):
        model = backbones.create_model(variant)
    assert sum(p.numel() for p in model.parameters()) == reference(family, variant)["params"]


def _stage_figures(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of the maps that go from stage to stage."""
    return case.get("features_eps1e-6") or case.get("stage_outputs") or case["features"]


def _like(value: Tensor, figures: dict[str, Any]) -> Tensor:
    """``value`` as tokens (B, HW, C) where the figures are of tokens."""
    return value if len(figures["shape"]) == value.ndim else value.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("family", "variant", "number"), _cases())
@torch.no_grad()
def test_outputs(family: str, variant: str, number: int) -> None:
    figures = reference(family, variant)
    case = figures["cases"][number]
    chosen = {k: v for k, v in case.get("kwargs", {}).items() if k == "n_win"}
    model = backbones.create_model(variant, **chosen).eval()
    report = backbones.load_checkpoint(model, checkpoint(figures))
    assert not (report.missing or report.unexpected or report.resized or report.reinitialised)

    x = image(case["input"], case["seed"])
    if "image" in case:
        maps = model.forward_intermediates(x, intermediates_only=True)
        error = summary_error(model(x), case["image"])
    else:
        last, maps = model.forward_intermediates(x)
        error = relative_error(model.forward_head(last), case["logits"])
    assert error <= tolerance(family)
    stages = _stage_figures(case)
    assert len(maps) == len(stages)
    for stage, expected in zip(maps, stages, strict=True):
        assert summary_error(_like(stage, expected), expected) <= tolerance(family)
