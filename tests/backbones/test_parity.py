"""Every variant reproduces the published model's outputs from the published weights' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import SMALL

import backbones
from backbones.cli.parity import (
    case_errors,
    checkpoint,
    image,
    reference,
    summary_error,
    tolerance,
    variants,
)

# Above this, a variant is loaded and run only by the slow tests.
QUICK_PARAMS = 15_000_000
# Cases with other regions, and of a second form at a size that nothing divides.
QUICK_CASES = {("biformer_tiny", 2), ("biformer_stl_nchw", 2)}


def _cases() -> list[Any]:
    """``(family, variant, number of the case)``; the quick ones are small, one size each."""
    cases = []
    for family, variant in variants():
        figures = reference(family, variant)
        quick = figures["params"] <= QUICK_PARAMS and figures["macs"] <= 5e9
        for number in range(len(figures["cases"])):
            chosen = quick and number == 0 or (variant, number) in QUICK_CASES
            slow = () if chosen else (pytest.mark.slow,)
            cases.append(pytest.param(family, variant, number, marks=slow))
    return cases


def test_every_variant_is_registered_and_measured():
    measured = {variant for _, variant in variants()}
    assert measured <= set(backbones.list_models())
    assert {family for family, _ in variants()} == set(backbones.list_families())
    assert set(SMALL) == set(backbones.list_families())


@pytest.mark.parametrize(("family", "variant", "number"), _cases())
def test_outputs(family, variant, number):
    output, stages = case_errors(family, variant, number)
    assert output <= tolerance(family, variant)
    assert max(stages) <= tolerance(family, variant)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(*both, marks=() if both[1][-2:] in ("m0", "m5", "s1") else pytest.mark.slow)
        for both in variants()
        if "distillation" in reference(*both)
    ],
)
@torch.no_grad()
def test_distilled(family, variant):
    """The mean of both heads, which train on their own."""
    figures = reference(family, variant)
    distillation = figures["distillation"]
    rows = figures["state_dict"] + distillation["state_dict_extra"]
    model = backbones.create_model(variant, distilled=True).eval()
    backbones.load_checkpoint(model, checkpoint(figures, rows))
    x = image(distillation["input"], distillation["seed"])
    assert summary_error(model(x), distillation["logits"]) < tolerance(family)
    pair = model.train()(torch.cat((x, x)))
    assert [logits.shape for logits in pair] == [(2, 1000), (2, 1000)]
    assert len(model.get_classifier()) == 2
    model.reset_classifier(3)
    assert model.eval()(x).shape == (1, 3)
    assert model.fuse()(x).isfinite().all()
