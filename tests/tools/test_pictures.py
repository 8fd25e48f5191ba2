"""The pictures of the pages, from the committed measurements."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def tool(tools: Callable[[str], ModuleType]) -> ModuleType:
    return tools("pictures")


def _row(size: int, **milliseconds: float) -> dict:
    place = {"batch": 1, "threads": 1, "dtype": "float32", "direction": "forward"}
    contenders = {name: {"milliseconds": time} for name, time in milliseconds.items()}
    return {"model": "van_b0", "size": size, "contenders": contenders, **place}


def test_ratios_are_of_one_report_and_one_size(tool: ModuleType) -> None:
    rows = [_row(224, fused=2, timm=6, eager=8), _row(448, fused=1, timm=50)]
    rows.append({**_row(224, fused=1, timm=70), "batch": 8})
    reports = [{"results": rows}, {"results": [_row(224, fused=4, openvino=6)]}]
    assert tool.speedups(reports) == {"van_b0": {"timm": 3, "openvino": 1.5}}


def test_the_pictures_are_drawn(tool: ModuleType, tmp_path: Path) -> None:
    for name in ("learning", "performance/zen5/neighborhood_attention", *tool.SPEED):
        file = Path(name).with_suffix(".json")
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS / file, tmp_path / file)
    (tmp_path / "assets").mkdir()
    tool.draw_all(tmp_path)
    drawn = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.png")}
    names = {"learning.png", "performance/zen5/neighborhood_attention.png", "assets/speed.png"}
    assert drawn.keys() == names
    for path in drawn.values():
        with Image.open(path) as picture:
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 100
