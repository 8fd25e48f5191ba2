"""The benchmark of neighborhood attention measures what it says and writes what it measured."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("benchmark_na")


def test_writes_figures_and_a_picture(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    setting = tool.Setting((9, 8), (3, 3), 8)
    monkeypatch.setattr(tool, "SETTINGS", [setting])
    output = tmp_path / "runs" / "na"
    tool.main(
        ["--batch", "1", "--dtype", "float32", "--rounds", "3", "--output", str(output)]
        + ["--contenders", "tiled", "gather", "triton", "sdpa-mask", "--max-gib", "1e-4"]
    )
    report = json.loads(output.with_suffix(".json").read_text())
    assert [row["backward"] for row in report["results"]] == [False, True]
    for row in report["results"]:
        contenders = row["contenders"]
        assert contenders["tiled"]["speedup_over_tiled"] == 1
        assert contenders["tiled"]["milliseconds"] > 0
        assert contenders["tiled"]["rounds"] == 3
        assert "CUDA" in contenders["triton"]["skipped"]
        assert "GiB" in contenders["gather"]["skipped"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.suffix for p in output.parent.iterdir()) == [".json", ".png"]


def test_runs_in_pieces_add_up(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    large, small = (tool.Setting((n, n), (3, 3), 4) for n in (6, 4))
    monkeypatch.setattr(tool, "SETTINGS", [large, small])
    measured = []

    def measure(setting, batch, dtype, backward, *rest):
        measured.append(setting.name)
        row = {"setting": setting.name, "batch": batch, "dtype": "float32", "backward": backward}
        # What is measured so far is in the file already.
        known = json.loads(file.read_text())["results"] if file.exists() else []
        return row | {"contenders": {}, "known": len(known)}

    monkeypatch.setattr(tool, "measure", measure)
    monkeypatch.setattr(tool, "draw", lambda report, path: path.write_bytes(b""))
    file = tmp_path / "na.json"
    once = ["--batch", "1", "--dtype", "float32", "--output", str(tmp_path / "na")]
    tool.main([*once, "--settings", small.name])
    tool.main([*once, "--settings", large.name, "--direction", "both"])
    tool.main([*once, "--resume"])
    assert measured == [small.name] * 2 + [large.name] * 2
    rows = json.loads(file.read_text())["results"]
    assert [tool.row_key(row)[::3] for row in rows] == [
        (large.name, False),
        (large.name, True),
        (small.name, False),
        (small.name, True),
    ]
    assert [row["known"] for row in rows] == [3, 2, 0, 1]
    tool.main([*once, "--settings", small.name])
    assert len(json.loads(file.read_text())["results"]) == 4

    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"machine": {"name": "another"}}))
    with pytest.raises(ValueError, match="another --output"):
        tool.main(once)


def test_slow_contenders_are_timed_once_and_the_slowest_skipped(tool: ModuleType) -> None:
    setting, device = tool.Setting((6, 5), (3, 3), 4), torch.device("cpu")
    names = ("tiled", "gather", "sdpa-mask")

    def measure(effort, expected) -> dict:
        return tool.measure(setting, 1, torch.float32, False, names, device, effort, expected)[
            "contenders"
        ]

    contenders = measure(tool.Effort(rounds=4, seconds=0.0, turn_ms=0.0), {"gather": 21.4})
    assert contenders["gather"] == {
        "skipped": "about 21 s per call, extrapolated from a smaller batch"
    }
    assert contenders["sdpa-mask"]["rounds"] == 1
    assert contenders["sdpa-mask"]["milliseconds"] > 0
    contenders = measure(tool.Effort(rounds=4, seconds=9.0, turn_ms=1.0), {"gather": 1.0})
    assert [contenders[name]["rounds"] for name in names] == [4, 4, 4]


@pytest.mark.parametrize(("name", "rounds"), [("cpu", 3), ("tiled", 1)])
def test_compilation_is_not_counted_as_call_time(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, rounds: int
) -> None:
    calls = iter([0.1])

    def attend(query, key, value):
        time.sleep(next(calls, 0.0))
        return query

    monkeypatch.setattr(tool, "contender", lambda *args: attend)
    setting, device = tool.Setting((4,), (3,), 4), torch.device("cpu")
    effort = tool.Effort(rounds=3, seconds=0.05, turn_ms=0.0)
    row = tool.measure(setting, 1, torch.float32, False, (name,), device, effort, {})
    assert row["contenders"][name]["rounds"] == rounds


def test_expects_what_smaller_batches_took(tool: ModuleType) -> None:
    setting = tool.Setting((4,), (3,), 5)

    def row(batch: int, **milliseconds: float) -> dict:
        contenders = {name: {"milliseconds": ms} for name, ms in milliseconds.items()}
        contenders["triton"] = {"skipped": "no GPU"}
        return {
            "setting": setting.name,
            "batch": batch,
            "dtype": "float32",
            "backward": True,
            "contenders": contenders,
        }

    report = {"results": [row(1, cpu=9.0), row(2, cpu=4.0, natten=3000.0), row(8, cpu=1.0)]}
    expected = tool.expected_seconds(report, setting, 8, "float32", True)
    assert expected == pytest.approx({"cpu": 0.016, "natten": 12.0})
    assert tool.expected_seconds(report, setting, 8, "bfloat16", True) == {}
