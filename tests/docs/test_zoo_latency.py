"""Latencies are measured variant by variant, kept, and found by the zoo page."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch):
    """Modules of ``tools/`` and ``tools/docs/`` by name."""
    before = set(sys.modules)
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.syspath_prepend(str(TOOLS / "docs"))
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if path and Path(path).is_relative_to(TOOLS):
            del sys.modules[name]


def test_from_measurement_to_row(tools, tmp_path, monkeypatch):
    output = tmp_path / "zoo.json"
    zoo_latency, zoo_page = tools("zoo_latency"), tools("zoo_page")
    monkeypatch.setattr(zoo_latency, "measure", partial(zoo_latency.measure, turn_seconds=0))
    monkeypatch.setattr(tools("benchmark"), "MATMUL_SIZE", 64)
    options = ["--rounds", "1", "--seconds", "0", "--output", str(output), "--models"]
    zoo_latency.main([*options, "shvit_s4"])
    first = json.loads(output.read_text())["results"]
    zoo_latency.main([*options, "efficientvit_m0"])
    report = zoo_page.latency_report(output)
    assert [result["model"] for result in report["results"]] == ["efficientvit_m0", "shvit_s4"]
    assert report["results"][1:] == first

    rows = {row.name: row for row in zoo_page.rows(report)}
    measured = {name for name, row in rows.items() if row.fused_ms is not None}
    assert measured == {"efficientvit_m0", "shvit_s4"}
    assert rows["shvit_s4"].latency_size == rows["shvit_s4"].top1_size == 256
    for name in measured:
        assert rows[name].latency_ms > 0 and rows[name].fused_ms > 0
    assert report["machine"]["name"] in zoo_page.machine_line(report)


def test_results_of_another_machine_are_replaced(tools, tmp_path):
    output = tmp_path / "zoo.json"
    output.write_text(json.dumps({"machine": {"name": "another"}, "results": [1]}))
    report_so_far = tools("zoo_latency").report_so_far
    assert report_so_far(output, {"name": "this"}) == {"machine": {"name": "this"}, "results": []}
    assert report_so_far(output, {"name": "another"})["results"] == [1]


def test_without_measurements_there_are_dashes(tools, tmp_path):
    zoo_page = tools("zoo_page")
    report = zoo_page.latency_report(tmp_path / "none.json")
    assert report is None and "zoo_latency.py" in zoo_page.machine_line(report)
    assert all(row.latency_ms is None and row.fused_ms is None for row in zoo_page.rows(report))


def test_an_unknown_pattern_is_named(tools, capsys):
    with pytest.raises(SystemExit):
        tools("zoo_latency").main(["--models", "vann*"])
    assert "vann*" in capsys.readouterr().err
