"""Every variant reproduces the published model's outputs from the published weights' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from zoo import SMALL

import backbones
from backbones.cli.parity import case_errors, reference, tolerance, variants

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


def test_parity_page_names_every_variant():
    page = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()
    for family, variant in variants():
        figures = reference(family, variant)
        row = next(line for line in page.splitlines() if f"| `{variant}` |" in line)
        assert f"| {figures['params'] / 1e6:.2f} |" in row
