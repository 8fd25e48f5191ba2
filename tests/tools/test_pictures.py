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
    return tools("build_pages")


def test_the_pictures_are_drawn(tool, tmp_path):
    names = ("learning", "performance/cpus", "performance/avx2/models")
    for name in names:
        file = Path(name).with_suffix(".json")
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS / file, tmp_path / file)
    (tmp_path / "assets").mkdir()
    tool.draw_all(tmp_path)
    drawn = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.png")}
    assert drawn.keys() == {"learning.png", "assets/speed.png"}
    for path in drawn.values():
        with Image.open(path) as picture:
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 100
