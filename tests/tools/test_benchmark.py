"""The benchmark of the models measures what it says and writes what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("benchmark", TOOLS / "benchmark.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(TOOLS))
        sys.modules.pop("benchmark_na", None)


@pytest.fixture(scope="module")
def report(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model at two sizes, beside timm and a peer from a file."""
    folder = tmp_path_factory.mktemp("benchmark")
    peer = folder / "original.py"
    peer.write_text(
        "import timm\n\ndef create_model(name):\n    return timm.create_model(name) "
        "if name.startswith('shvit') else None\n"
    )
    tool.main(
        ["--models", "shvit_s1", "--sizes", "32", "64", "--batches", "2", "--rounds", "3"]
        + ["--against", "timm", str(peer), "--output", str(folder / "out")]
    )
    return folder / "out.json"


def test_rows(report: Path) -> None:
    written = json.loads(report.read_text())
    assert written["machine"]["torch"]
    for row, size in zip(written["results"], (32, 64), strict=True):
        assert (row["size"], row["batch"], row["dtype"]) == (size, 2, "float32")
        assert list(row["contenders"]) == ["eager", "fused", "timm", "original"]
        fused = row["contenders"]["fused"]
        assert fused["speedup_over"].keys() == {"eager", "timm", "original"}
        assert fused["difference_from_eager"] < 1e-4
        assert 0 < fused["fastest"] <= fused["milliseconds"] <= fused["p90"] <= fused["p99"]
        assert fused["images_per_second"] == pytest.approx(2e3 / fused["milliseconds"])
    small, large = (row["macs"] for row in written["results"])
    assert 2 < large / small < 4  # without the head four times as much


def test_table_picture_and_growth(tool: ModuleType, report: Path) -> None:
    text = report.with_suffix(".md").read_text()
    assert text.count("| shvit_s1 |") == 8 and "time grows as pixels to the" in text
    assert report.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert sorted(p.name for p in report.parent.iterdir()) == [
        "original.py",
        "out.json",
        "out.md",
        "out.png",
    ]


def test_comparison(tool: ModuleType, report: Path) -> None:
    new = json.loads(report.read_text())
    old = json.loads(report.read_text())
    old["results"][0]["contenders"]["fused"]["milliseconds"] *= 2
    del old["results"][1]
    lines = tool.comparison(old, new)
    assert len(lines) == 4
    assert [line for line in lines if "fused" in line][0].endswith("2.00×")


def test_training_has_no_fused_mode(tool: ModuleType) -> None:
    row = tool.Row("shvit_s1", 64, 2, 1, "float32", "train")
    measured = tool.measure(row, ["eager", "fused"], {}, rounds=1, seconds=1)
    assert list(measured["contenders"]) == ["eager"]


def test_a_contender_that_fails_is_named(tool: ModuleType) -> None:
    def create(name: str) -> None:
        raise RuntimeError(f"cannot make {name}")

    row = tool.Row("shvit_s1", 32, 1, 1, "float32", "forward")
    measured = tool.measure(row, ["eager"], {"broken": create}, rounds=1, seconds=1)
    assert measured["contenders"]["broken"] == {"skipped": "RuntimeError: cannot make shvit_s1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet5"], "unknown models resnet5"),
        (["--compare", "nowhere.json"], "there is no file nowhere.json"),
    ],
)
def test_bad_arguments(tool: ModuleType, arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        tool.parse(arguments)
    assert message in capsys.readouterr().err


def test_bad_peers(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        tool.peer(str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match="No module named"):
        tool.peer("no_such_package_anywhere")
    with pytest.raises(ValueError, match="json has no function create_model"):
        tool.peer("json")


def test_page(tool: ModuleType, report: Path) -> None:
    spec = importlib.util.spec_from_file_location("performance_page", TOOLS / "performance_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    measured = json.loads(report.read_text())
    empty = {"machine": measured["machine"], "results": []}
    text = module.page(empty, measured)
    row = measured["results"][0]["contenders"]
    ratio = row["timm"]["milliseconds"] / row["fused"]["milliseconds"]
    assert f"| `shvit_s1` | 32 | {row['fused']['milliseconds']:.1f} |" in text
    assert f"| {ratio:.2f}×" in text and "## Neighborhood attention" in text
    assert "## Models" not in module.page(empty, None)
