"""All reports become one row for each CPU and setting, and pages claim what these say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from backbones.cli.benchmark_report import Cell, rivals, speed, speed_lines
from backbones.cli.reports import is_older, kernel_digest, provenance
from ops.cpu.build import load

DOCS = Path(__file__).parents[2] / "docs"


def _row(date: str = "2026-01-02", **contenders: Any) -> dict[str, Any]:
    place = {"model": "van_b0", "size": 224, "batch": 1, "threads": 1, "direction": "forward"}
    timed = {
        name: {"milliseconds": figure, "speedup_over": {}}
        if isinstance(figure, float)
        else {"skipped": figure}
        for name, figure in contenders.items()
    }
    return {**place, "dtype": "float32", "macs": 1, "date": date, "contenders": timed}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    machines = [
        {"key": "a", "name": "CPU A", "models": "", "instruction_set": "avx512", "reports": ""},
        {"key": "b", "name": "CPU B", "models": "", "instruction_set": "avx2", "reports": "b/"},
    ]
    known = {"machines": machines, "files": {}, "restricted": {"b/few.json": "portable"}}
    _write(tmp_path / "performance" / "cpus.json", known)
    return tmp_path


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))


def _report(*rows: dict[str, Any], **machine: str) -> dict[str, Any]:
    return {"machine": {"name": "x", "torch": "2.13", **machine}, "results": list(rows)}


def test_the_newest_row_counts_and_earlier_ones_fill_gaps(tool, docs):
    old = _row("2026-01-01", eager=9.0, fused=3.0, openvino=2.7, onnxruntime="cannot")
    _write(docs / "performance" / "old.json", _report(old))
    _write(docs / "performance" / "new.json", _report(_row(eager=8.0, fused=2.0)))
    (found,) = tool.measured(docs)
    assert found.row["date"] == "2026-01-02" and found.is_older
    assert found.cells["float32"] == Cell("fused", 2.0)
    assert found.cells["OpenVINO"] == Cell("openvino", 2.7)
    assert found.others == {"OpenVINO": "2026-01-01", "ONNX Runtime": "2026-01-01"}
    assert found.cells["ONNX Runtime"] == Cell("onnxruntime", None, "cannot")
    assert found.cells["compile"] == Cell()  # not measured, unlike failed
    # A loss of an earlier row is not forgotten, and ratios are of one row.
    assert found.over["float32"] == (pytest.approx(0.9), "openvino")
    assert found.ratios == {"eager": 4.0, "OpenVINO": pytest.approx(0.9)}


def test_of_one_day_todays_kernels_count(tool, docs):
    before = _row(eager=8.0, fused=3.0, openvino=2.7)
    now = {**_row(eager=8.0, fused=2.0), "kernels": {}}
    _write(docs / "performance" / "a.json", _report(before, now))
    (found,) = tool.measured(docs)
    assert not found.is_older and found.cells["float32"] == Cell("fused", 2.0)
    assert found.cells["OpenVINO"] == Cell("openvino", 2.7)


def test_processors_are_found_by_the_names_that_they_report():
    known = json.loads((DOCS / "performance" / "cpus.json").read_text())["processors"]
    for isa, names in {
        "amx": "Xeon(R) Platinum 8488C; Xeon(R) Gold 6430; XEON(R) 6747P; m7i",
        "avx512bf16": "Ryzen 9 9950X 16-Core; Ryzen 7 7840U; Ryzen 7 8845HS; EPYC 9R14; EPYC 4565P",
        "avx512": "Core(TM) i7-1065G7; Core(TM) i9-10980XE; i7-11700K; Xeon(R) Gold 6338",
        "avx2": "Core(TM) i7-8700; Ryzen 5 5600X; Ryzen 7 7730U; EPYC 7R32; Xeon(R) CPU E5-2680 v4",
        **{"neonbf16": "Apple M2; Apple M4 Max; Graviton4; m7g", "neon": "Apple M1 Pro; m6g"},
    }.items():
        for name in names.lower().split("; "):
            found = [each for each in known if re.search(each["pattern"], name)]
            assert [each["instruction_set"] for each in found] == [isa], name


def test_cpus_and_restrictions_stand_apart(tool, docs):
    row = _row(eager=2.0, fused=1.0)
    for name, machine in {"a": {}, "c": {"instruction_set": "avx2"}}.items():
        _write(docs / "performance" / f"{name}.json", _report(row, **machine))
    for name in ("b/few", "b/all"):
        _write(docs / "performance" / f"{name}.json", _report(row))
    places = [(each.cpu, each.isa) for each in tool.measured(docs)]
    assert places == [("a", ""), ("a", "avx2"), ("b", ""), ("b", "portable")]


def test_contenders_are_compared_within_their_dtype():
    row = _row(
        **{"eager": 4.0, "channels_last": 3.0, "fused": 1.0, "fused+bfloat16": 0.5, "int8": 0.4},
        **{
            "openvino_bf16": 0.6,
            "openvino_nncf": 0.3,
            "pt2e_x86": "cannot",
            "compile_freezing": 2.0,
        },
        **{"natten_0_17": 0.1, "fused+compile": 0.1},
    )
    row["contenders"]["fused"]["speedup_over"] = {"channels_last": 3.5}
    assert rivals(row, "float32") == {"eager": 4.0, "channels_last": 3.5, "compile_freezing": 2.0}
    assert rivals(row, "bfloat16") == {"openvino_bf16": pytest.approx(1.2)}
    assert rivals(row, "int8") == {"openvino_nncf": pytest.approx(0.75)}
    assert speed(row)["eager"] == Cell("channels_last", 3.0)
    assert speed(row)["compile"] == Cell("compile_freezing", 2.0)
    assert rivals(_row(eager=1.0), "float32") == {}


def test_the_command_prints_the_same_row():
    row = _row(eager=4.0, fused=2.0, openvino=1.0, onnxruntime="cannot")
    *_, line = speed_lines({"results": [{**row, "direction": "train"}, row]})
    assert line == (
        "| van_b0 | 224 | 1 | 1 | 4.00 ms | – | failed | 1.00 ms | 2.00 ms | – | – "
        "| float32 0.50× openvino |"
    )


def test_rows_say_when_and_with_which_kernels_they_were_measured(tool):
    load("gemm")
    found = provenance()
    assert found["kernels"]["gemm"] == kernel_digest("gemm") != "" and len(found["date"]) == 10
    assert not is_older(found) and is_older({}) and is_older({"kernels": {"gone": "0" * 8}})
    others = {**found["kernels"], "gemm": "0" * 8}
    assert is_older({**found, "kernels": others})


def test_every_committed_row_has_a_date_and_a_commit(tool):
    for name, report in tool.reports(DOCS).items():
        for row in report["results"]:
            assert {"date", "commit"} <= row.keys(), name


def test_medians_and_losses(tool, docs):
    slow = {**_row(eager=2.0, fused=1.0, openvino=0.5), "model": "shvit_s4"}
    rows = [_row(eager=4.0, fused=1.0), slow, {**_row(eager=9.0, fused=1.0), "batch": 8}]
    _write(docs / "performance" / "a.json", _report(*rows))
    _write(docs / "performance" / "b" / "a.json", _report(_row(eager=3.0, fused=2.0)))
    assert tool.four_cpus(docs).splitlines()[2:] == [
        "| CPU A |  | 3.00× (2) | not measured | 0.50× (1) | `shvit_s4` | 2026-01-02 |",
        "| CPU B |  | 1.50× (1) | not measured | not measured | none | 2026-01-02 |",
    ]


def test_losses_have_reasons(tool: ModuleType, docs: Path) -> None:
    kernels = {"kernels": {}, "matmul_gflops": {"float32": 100.0}, "macs": 10**8}
    slow = {**_row(eager=4.0, fused=3.0, openvino=2.0), **kernels, "batch": 8}
    older = {**_row(eager=4.0, fused=3.0, openvino=2.0), "model": "shvit_s4"}
    _write(docs / "performance" / "a.json", _report(slow, older))
    reasons = [{"models": "v*", "dtypes": "float32", "reason": "because"}]
    _write(docs / "performance" / "losses.json", {"reasons": reasons})
    assert tool.losses(docs).splitlines()[2:] == [
        "| `shvit_s4` | CPU A | 1 | 1 | float32 | 3.00 | – | 0.667× OpenVINO | 2026-01-02, older "
        "| – |",
        "| `van_b0` | CPU A | 8 | 1 | float32 | 3.00 | 16.00 | 0.667× OpenVINO | 2026-01-02 "
        "| because |",
    ]
    assert tool.reason(docs, "van_b0", "int8") == ""


def test_every_loss_of_todays_kernels_has_a_reason(tool: ModuleType) -> None:
    for line in tool.losses(DOCS).splitlines()[2:]:
        assert ", older" in line or not line.endswith("| – |"), line


def test_gains_of_timm_and_what_was_not_measured(tool: ModuleType, docs: Path) -> None:
    fast = {**_row(eager=4.0, fused=1.0, openvino=2.0), "model": "timm/resnet50"}
    slow = {**_row(eager=2.0, fused=1.0, openvino=0.5), "model": "timm/regnety_032"}
    _write(docs / "performance" / "a.json", _report(fast, slow, _row(eager=1.0, fused=1.0)))
    _write(
        docs / "performance" / "b" / "a.json", _report(_row(eager=3.0, fused=2.0, onnxruntime=1.0))
    )
    assert tool.timm_gain(docs) == (
        "On CPU A (one image, one thread, float32), fused models of timm are 3.00 times as fast as "
        "in eager PyTorch (median of 2) and 1.25 times as fast as in OpenVINO (median of 2). "
        "Slower than in another library: `regnety_032`."
    )
    assert tool.unmeasured(docs) == (
        "on CPU A: torch.compile, ONNX Runtime, OpenVINO in bfloat16, int8; "
        "on CPU B: torch.compile, OpenVINO, OpenVINO in bfloat16, int8"
    )
