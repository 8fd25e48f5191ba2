"""NOTICE names every family, in rows that ``make pages`` fills."""

from __future__ import annotations

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


def test_notice_is_filled(tables):
    notice = (ROOT / "NOTICE").read_text()
    assert tables.notice(notice) == notice, "make pages: NOTICE lacks a row"


def test_rows_of_a_new_family(tables, monkeypatch):
    """One that only its module, its page and its figures name so far."""
    monkeypatch.setattr(backbones, "list_families", lambda: ["van"])
    changed = tables.notice("Above.\n\nModel: paper\nOld row\n\nBelow.\n")
    assert changed == (
        "Above.\n\nModel: paper\n"
        "VAN: Guo et al., Visual Attention Network, arXiv:2202.09741.\n"
        "  Visual-Attention-Network/VAN-Classification; licence: Apache-2.0 (README adds: for "
        "commercial use,\n"
        "  please contact the authors)\n\nBelow.\n"
    )


def test_a_module_without_citation_is_named(tables, monkeypatch):
    monkeypatch.setattr(backbones.van, "__doc__", "Visual Attention Network.")
    with pytest.raises(ValueError, match="van: cite the paper as"):
        tables.notice("Model\n\n")
