"""Pages: marked places are filled from the measurements, and tables say what was measured.

The committed pages hold most of what a table says; here is what no committed measurement shows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"
Tools = Callable[[str], ModuleType]


# --- places


def test_the_committed_pages_are_filled(tool):
    pages = [page for page in tool.pages() if tool.places(page.read_text())]
    assert {page.name for page in pages} >= {"CHANGELOG.md", "learning.md", "parity.md"}
    for page in pages:
        assert tool.filled(page, DOCS) == page.read_text(), f"make pages: {page}"


def test_every_measurement_is_on_a_page(tool):
    pages = [page.read_text() for page in tool.pages()]
    shown = {file for text in pages for _, files, _ in tool.places(text) for file in files}
    merged = set(tool.speeds.reports(DOCS))  # the table of the page Speed
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.json")}
    assert there - shown - merged == {"performance/cpus.json", "performance/losses.json"}


def test_places_are_filled_and_prose_stays(tool, tmp_path):
    machine = {"name": "a CPU", "cpu_capability": "AVX2", "torch": "2"}
    row = {"way": "wheel", "model": "van_b0", "plain": {"seconds": 0.5}}
    row["fused"] = {"seconds": 1.0, "cpu_seconds": 2.0}
    report = {"machine": machine, "results": [row]}
    (tmp_path / "a.json").write_text(json.dumps(report))
    page = tmp_path / "a.md"
    page.write_text(
        "# Title\n\nOn <!-- fact: machine a.json -->another<!-- end -->, once.\n\n"
        "<!-- table: cold_start a.json -->\nstale\n<!-- end -->\n\nThe end.\n"
    )
    text = tool.filled(page, tmp_path)
    assert "\nOn <!-- fact: machine a.json -->a CPU (AVX2), torch 2<!-- end -->, once.\n" in text
    assert "| a wheel | `van_b0` | 0.50 | 1.00 | 2.00 |\n\n<!-- end -->\n\nThe end.\n" in text
    assert "stale" not in text and "another" not in text
    page.write_text(text)
    assert tool.filled(page, tmp_path) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: nonsense a.json --><!-- end -->", "nonsense a.json: KeyError"),
        ("<!-- table: growth no.json --><!-- end -->", "growth no.json: FileNotFoundError"),
        ("<!-- table: growth a.json aim=no --><!-- end -->", "growth a.json: TypeError"),
        ("<!-- table: models a.json -->", "1 places begin, 0 end"),
        (
            "A <!-- fact: machine a.json --> <!-- fact: machine a.json --><!-- end -->",
            "2 places begin",
        ),
        ("<!-- end -->", "0 places begin, 1 end"),
        ("- <!-- fact: torch a.json --><!-- end -->", "put a word before - <!-- fact: torch"),
    ],
)
def test_places_that_cannot_be_filled_are_named(tool, tmp_path, text, said):
    (tmp_path / "a.json").write_text('{"machine": {}, "results": []}')
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md: ") as raised:
        tool.filled(tmp_path / "page.md", tmp_path)
    assert said in str(raised.value)


def test_the_command_fills_and_rewrites(tool, tmp_path, monkeypatch):
    for name, text in (("README.md", "Nothing to fill.\n"), ("NOTICE", "Model\n\nOthers.\n")):
        (tmp_path / name).write_text(text)
    tmp_path /= "docs"
    tmp_path.mkdir()
    monkeypatch.setattr(tool, "DOCS", tmp_path)
    report = {
        "machine": {"name": "x", "cpu_capability": "y", "torch": "2"},
        "results": [{"a": 0.1}],
    }
    (tmp_path / "a.json").write_text(json.dumps(report, indent=1))
    page = tmp_path / "a.md"
    page.write_text("In <!-- fact: torch a.json --><!-- end -->\n")
    tool.main([])
    assert page.read_text() == "In <!-- fact: torch a.json -->2<!-- end -->\n"
    before = page.stat().st_mtime_ns
    tool.main([])
    assert page.stat().st_mtime_ns == before
    tool.main(["--rewrite"])
    assert len((tmp_path / "a.json").read_text().splitlines()) == 7


def test_the_pictures_are_drawn(tool, tmp_path):
    for name in ("learning", "performance/cpus", "performance/avx2/models"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS / f"{name}.json", tmp_path / f"{name}.json")
    (tmp_path / "assets").mkdir()
    tool.draw_all(tmp_path)
    drawn = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.png")}
    assert drawn.keys() == {"learning.png", "assets/speed.png"}
    for path in drawn.values():
        with Image.open(path) as picture:
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 100


# --- models and operators


@pytest.fixture(scope="module")
def models(tools: Tools) -> ModuleType:
    return tools("tables_models")


def test_settings_without_an_aim_are_left_out(models, tools):
    row = json.loads((DOCS / "performance" / "avx2" / "models.json").read_text())["results"][0]
    row |= {"model": "shvit_s4", "size": 224, "direction": "forward"}
    changes = [{}, {"batch": 4}, {"size": 448}, {"model": "unknown"}]
    found = models.aims({"results": [{**row, **change} for change in changes]})
    assert [line.split(" | ")[:2] for line in found.splitlines()[2:]] == [["| `shvit_s4`", "1"]]
    fused = row["contenders"]["fused"]
    newer = {"contenders": {**row["contenders"], "fused": {**fused, "gflops": 9876.0}}}
    both = [{**row, **newer, "date": "2026-12-02"}, {**row, "date": "2026-12-01"}]
    assert "9876" in models.aims({"results": both}).splitlines()[-1]
    assert len(models.aims({"results": both}).splitlines()) == 3
    # What was not measured is neither met nor missed.
    assert "tiled" not in tools("tables_ops").neighborhood_aims({"results": []})


def test_the_faster_plain_form_counts(models):
    over = {
        "van_b0": {"eager": 1.5, "channels_last": 0.96},
        "van_b1": {"eager": 1.2, "channels_last": 1.4},
        "shvit_s1": {"eager": 0.97, "channels_last": 1.0, "timm": 0.5},
        "shvit_s2": {"eager": 1.0},
        "shvit_s3": {},
    }
    rows = [
        {"model": m, "batch": 1, "threads": 1, "contenders": {"fused": {"speedup_over": of_model}}}
        for m, of_model in over.items()
    ]
    (line,) = models.floors({"machine": {"restricted": "none"}, "results": rows}).splitlines()[2:]
    assert line == "| none | 4 | 2 | 1 | 0.960× (`van_b0`, 1 images, 1 thread) | 0.98× |"


# --- accuracy


# Validation accuracy in %, where it is not 90; chance is 10. The 4×4 tokens of this one are padded
# to its windows of 7×7, so that two thirds of what a token sees are zeros: four epochs are few.
LEAST = {"nat_isotropic_small": 50}


def test_every_family_has_learnt_by_the_recipe(tools):
    report = json.loads((DOCS / "learning.json").read_text())
    accuracy = tools("accuracy")
    assert tuple(report["results"]) == accuracy.CLASSIFIERS
    assert report["recipe"] == yaml.safe_load(accuracy.DIGITS.read_text())
    for model, result in report["results"].items():
        assert max(row["val_top1"] for row in result["history"]) > LEAST.get(model, 90), model
    throughput = json.loads((DOCS / "performance" / "training.json").read_text())
    assert throughput["loader"]["met"] and throughput["step"]["met"]


# --- int8


def _row(model: str, kind: str, **forms: dict[str, Any]) -> dict[str, Any]:
    forms = {name.replace("calibrated", "int8_calibrated"): form for name, form in forms.items()}
    return {
        "model": model,
        "family": model.split("_")[0],
        "kind": kind,
        "layers": 9,
        "forms": forms,
    }


def _form(top1: float, agreement: float, **more: Any) -> dict[str, Any]:
    return {"top1": top1, "agreement": agreement, "error": 0.01, **more}


def _cells(text: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines()[2:]]
    return [[cell.strip() for cell in line] for line in lines]


def test_int8_and_what_misses_its_target(models):
    failed = {"failed": "ValueError: it has |\n more than one output"}
    exact, psnr = _form(98.0, 100.0), {"psnr": 35.3}
    int8, calibrated = _form(97.7, 99.0, quantized=8), _form(97.5, 99.5, quantized=7)
    disagreeing = _form(98.0, 98.9)
    rows = [
        _row("van_b0", "digits", float32=exact, int8=int8, calibrated=calibrated),
        _row("biformer_tiny", "digits", float32=exact, int8=failed, calibrated=disagreeing),
        _row("hat_s", "pictures", float32=psnr, int8={"psnr": 35.2}, calibrated={"psnr": 35.0}),
    ]
    report = {"machine": {"instruction_set": "amx"}, "results": rows}
    assert [[cell[0], *cell[2:]] for cell in _cells(models.int8_accuracy(report))] == [
        ["biformer", "–", "98.00", "–", "–", "–", "**+0.00 (98.9)**"],
        ["van", "7/8 of 9", "98.00", "–", "–", "−0.30 (99.0)", "**−0.50 (99.5)**"],
    ]
    assert models.int8_met(report) == (
        "`int8` meets both in 1 of 1 models; `int8, calibrated` meets both in 0 of 2 models."
    )
    (restored,) = _cells(models.int8_restoration(report))
    assert restored[-2:] == ["35.20 (−0.100)", "**35.00 (−0.300)**"]
    reason = "`ValueError: it has | more than one output`"
    assert models.failures(report) == f"- `biformer_tiny`, int8: {reason}"
