"""Arrows run one way: tools and scripts → backbones → ops; the import stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import backbones

ROOT = Path(__file__).parent.parent


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(ROOT.glob("ops/**/*.py")), ids=lambda p: p.stem)
def test_ops_know_no_backbones(path: Path) -> None:
    assert not {n for n in _imports(path) if n.split(".")[0] in ("backbones", "tools", "train_cls")}


@pytest.mark.parametrize("family", backbones.list_families())
def test_families_do_not_know_each_other(family: str) -> None:
    others = {f"backbones.{other}" for other in backbones.list_families() if other != family}
    for name in _imports(ROOT / "backbones" / f"{family}.py"):
        assert not any(f"{name}.".startswith(f"{other}.") for other in others), name


_TIMES = """
import sys
import time
import timm
before = set(sys.modules)
start = time.perf_counter()
import backbones
print(time.perf_counter() - start)
heavy = {"triton", "torch._inductor", "torchvision.models.detection", "matplotlib", "sklearn",
         "backbones.training", "mmengine", "natten"}
print(sorted(heavy & (sys.modules.keys() - before)))
"""


def test_import_is_cheap() -> None:
    """`import backbones` adds at most 0.3 s to `import timm`; the best of five, to spare noise."""
    times, loaded = [], ""
    for _ in range(5):
        run = subprocess.run(
            [sys.executable, "-c", _TIMES],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        seconds, loaded = run.stdout.splitlines()
        times.append(float(seconds))
    assert min(times) <= 0.3
    assert loaded == "[]"


def test_a_foreign_ops_is_named(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import backbones"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert "ImportError: `backbones` needs its own package `ops`" in run.stderr
    assert str(tmp_path) in run.stderr
