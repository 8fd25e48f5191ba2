"""The speed plot of README, from the committed reports."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

PATH = Path(__file__).parents[2] / "tools" / "speed_picture.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_picture", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row(size: int, **milliseconds: float) -> dict:
    place = {"batch": 1, "threads": 1, "dtype": "float32", "direction": "forward"}
    contenders = {name: {"milliseconds": time} for name, time in milliseconds.items()}
    return {"model": "van_b0", "size": size, "contenders": contenders, **place}


def test_ratios_are_of_one_report_and_one_size(tool: ModuleType) -> None:
    rows = [_row(224, fused=2, timm=6, eager=8), _row(448, fused=1, timm=50)]
    rows.append({**_row(224, fused=1, timm=70), "batch": 8})
    reports = [{"results": rows}, {"results": [_row(224, fused=4, openvino=6)]}]
    assert tool.speedups(reports) == {"van_b0": {"timm": 3, "openvino": 1.5}}


def test_the_picture_is_drawn_from_the_committed_reports(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.main(["--out", str(tmp_path / "speed.png")]) == 0
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 100
