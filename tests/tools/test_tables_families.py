"""README and NOTICE name every family, in rows that ``make pages`` fills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import backbones

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables(tools: Callable[[str], ModuleType]) -> Any:
    return tools("tables_families")


def test_readme_and_notice_are_filled(tables: Any) -> None:
    rows = tables.families(json.loads((ROOT / "docs" / "parity.json").read_text())).splitlines()
    missing = set(rows) - set((ROOT / "README.md").read_text().splitlines())
    assert not missing, "make pages: README lacks these rows"
    notice = (ROOT / "NOTICE").read_text()
    assert tables.notice(notice) == notice, "make pages: NOTICE lacks a row"
    assert len(rows) == 2 + len(backbones.list_families())


def test_rows_of_a_new_family(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only its module, its page and its figures name so far."""
    report = {"van_b0": {"output": 2.34e-6}, "van_b1": {"output": 5e-7}}
    monkeypatch.setattr(backbones, "list_families", lambda: ["van"])
    (row,) = tables.families(report).splitlines()[2:]
    link = "[2202.09741](https://arxiv.org/abs/2202.09741)"
    assert row == f"| VAN | `van_b0/b1/b2/b3/b4/b5/b6` | 2.3e-6 | Apache-2.0² | {link} |"
    changed = tables.notice("Above.\n\nModel: paper\nOld row\n\nBelow.\n")
    assert changed == (
        "Above.\n\nModel: paper\n"
        "VAN: Guo et al., Visual Attention Network, arXiv:2202.09741.\n"
        "  Visual-Attention-Network/VAN-Classification; licence: Apache-2.0 (README adds: for "
        "commercial use,\n"
        "  please contact the authors)\n\nBelow.\n"
    )


def test_a_module_without_citation_is_named(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones.van, "__doc__", "Visual Attention Network.")
    with pytest.raises(ValueError, match="van: cite the paper as"):
        tables.notice("Model\n\n")
