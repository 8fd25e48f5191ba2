"""Diagrams are well-formed, stay in their frames, and there is one for each family."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import backbones

ROOT = Path(__file__).resolve().parents[2]
TOOLS, PAGES = ROOT / "tools" / "docs", ROOT / "docs" / "families"


@pytest.fixture
def tools(monkeypatch):
    """The site's modules, importable as MkDocs' hooks import them."""
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module
    for name in ("block_diagrams", "hooks", "zoo_page"):
        sys.modules.pop(name, None)


def test_every_family_has_a_page():
    families = set(backbones.list_families())
    assert {page.stem for page in PAGES.glob("*.md")} == families | {"index"}


def boxes(element, x=0.0, y=0.0):
    """(left, top, right, bottom) of each rectangle, in the picture's own coordinates."""
    if match := re.match(r"translate\(([\d.]+),([\d.]+)\)", element.get("transform", "")):
        x, y = x + float(match[1]), y + float(match[2])
    if element.tag == "rect":
        left, top = x + float(element.get("x", 0)), y + float(element.get("y", 0))
        yield left, top, left + float(element.get("width")), top + float(element.get("height"))
    for child in element:
        yield from boxes(child, x, y)


@pytest.mark.parametrize("family", backbones.list_families())
def test_boxes_lie_in_the_frame_and_apart(tools, family):
    (text,) = tools("hooks").BLOCK.findall((PAGES / f"{family}.md").read_text())
    for title, steps in tools("block_diagrams").parse(text):
        figure = ElementTree.fromstring(tools("block_diagrams").panel(title, steps))
        svg = figure.find("svg")
        found = list(boxes(svg))
        assert found
        for left, top, right, bottom in found:
            assert left >= 0 and top >= 0
            assert right <= float(svg.get("width")) and bottom <= float(svg.get("height"))
        for i, a in enumerate(found):
            for b in found[i + 1 :]:
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                assert apart, (title, a, b)
