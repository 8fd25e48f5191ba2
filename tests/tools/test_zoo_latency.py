"""Latencies are measured variant by variant, kept, and found by the zoo page."""

from __future__ import annotations

import json
from functools import partial

from backbones.cli import benchmark as models


def test_from_measurement_to_row(tools, tmp_path, monkeypatch):
    output = tmp_path / "zoo.json"
    zoo, zoo_page = tools("benchmark").zoo, tools("zoo_page")
    monkeypatch.setattr(models, "measure", partial(models.measure, turn_seconds=0))
    monkeypatch.setattr("backbones.cli.timing.MATMUL_SIZE", 64)
    options = ["--rounds", "1", "--seconds", "0", "--output", str(output), "--models"]
    zoo([*options, "shvit_s4"])
    first = json.loads(output.read_text())["results"]
    zoo([*options, "efficientvit_m0"])
    report = json.loads(output.read_text())
    assert [result["model"] for result in report["results"]] == ["efficientvit_m0", "shvit_s4"]
    assert report["results"][1:] == first

    (tmp_path / "performance").mkdir()
    output.rename(tmp_path / "performance" / "zoo.json")
    cpus = {"key": "here", "name": "this CPU", "reports": "", **report["machine"]}
    known = {"machines": [cpus], "files": {}, "restricted": {}}
    (tmp_path / "performance" / "cpus.json").write_text(json.dumps(known))
    found = tools("speeds").measured(tmp_path)
    rows = {row.name: row for row in zoo_page.rows(found)}
    measured = {name for name, row in rows.items() if row.fused_ms is not None}
    assert measured == {"efficientvit_m0", "shvit_s4"}
    assert rows["shvit_s4"].latency_size == rows["shvit_s4"].top1_size == 256
