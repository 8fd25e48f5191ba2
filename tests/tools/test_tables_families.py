"""NOTICE names every family, in rows that ``make pages`` fills."""

from __future__ import annotations

from pathlib import Path

import backbones

ROOT = Path(__file__).parents[2]


def test_notice_is_filled(tool):
    notice = (ROOT / "NOTICE").read_text()
    assert tool.notice(notice) == notice, "make pages: NOTICE lacks a row"


def test_rows_of_a_new_family(tool, monkeypatch):
    """One that only its module, its page and its figures name so far."""
    monkeypatch.setattr(backbones, "list_families", lambda: ["van"])
    changed = tool.notice("Above.\n\nModel: paper\nOld row\n\nBelow.\n")
    assert changed == (
        "Above.\n\nModel: paper\n"
        "VAN: Guo et al., Visual Attention Network, arXiv:2202.09741.\n"
        "  Visual-Attention-Network/VAN-Classification; licence: Apache-2.0 (README adds: for "
        "commercial use,\n"
        "  please contact the authors)\n\nBelow.\n"
    )
