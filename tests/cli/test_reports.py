"""Reports of measurements: rows in lines, rounded figures, runs that add up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from backbones.cli.reports import load_report, put_rows, rounded, text_of, write_report

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted(DOCS.rglob("*.json"))
REPORT = {
    "machine": {"name": "a CPU", "threads": 1},
    "results": [
        {"model": "a", "batch": 1, "contenders": {"fused": {"milliseconds": 12.34567}}},
        {"model": "b", "batch": 8, "contenders": {"fused": {"speedup_over": {"eager": 2.499961}}}},
    ],
}


def test_a_row_is_a_line():
    assert text_of(REPORT).splitlines() == [
        "{",
        '"machine": {"name": "a CPU", "threads": 1},',
        '"results": [',
        '{"model": "a", "batch": 1, "contenders": {"fused": {"milliseconds": 12.35}}},',
        '{"model": "b", "batch": 8, "contenders": {"fused": {"speedup_over": {"eager": 2.5}}}}',
        "]",
        "}",
    ]
    by_name = {"b": {"top1": 98.87323943}, "a": {"seconds": 1234.56}}
    assert text_of(by_name).splitlines() == [
        "{",
        '"b": {"top1": 98.873},',  # in the order given
        '"a": {"seconds": 1235.0}',
        "}",
    ]
    assert text_of({"machine": None, "results": []}) == '{\n"machine": null,\n"results": []\n}\n'


def test_what_is_compared_with_a_target_keeps_a_digit_more():
    found = rounded({"speedup_over": {"eager": 1.2345678}, "milliseconds": 1.2345678, "count": 7})
    assert found == {"speedup_over": {"eager": 1.2346}, "milliseconds": 1.235, "count": 7}
    assert rounded([math.nan, math.inf, 0.0, True, 1e-7 / 3]) == [None, None, 0.0, True, 3.333e-08]


def test_committed_measurements_are_as_they_are_written():
    assert FILES
    lines = 0
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert text == text_of(json.loads(text)), f"python tools/build_pages.py --rewrite {file}"
        lines += text.count("\n")
    assert lines < 5000


def test_a_row_measured_again_keeps_its_place():
    report = json.loads(text_of(REPORT))
    anew = [{"model": "a", "batch": 1, "contenders": {}}, {"model": "c", "batch": 1}]
    put_rows(report, anew, ("model", "batch"))
    assert [row["model"] for row in report["results"]] == ["a", "b", "c"]
    assert report["results"][0] == anew[0]
    put_rows(report, [{"model": "c", "batch": 1, "new": 1}], ("model", "batch"))
    assert report["results"][2]["new"] == 1 and len(report["results"]) == 3


def test_runs_on_another_machine_do_not_add_up(tmp_path):
    path = tmp_path / "new" / "a.json"
    assert load_report(path, {"name": "this"}) == {"machine": {"name": "this"}, "results": []}
    write_report(path, REPORT)
    here = {**REPORT["machine"], "instruction_set": "amx"}  # which older reports do not name
    assert load_report(path, here) == {"format": 1, **json.loads(text_of(REPORT))}
    for other in ({"name": "this", "threads": 1}, {"name": "a CPU"}):
        with pytest.raises(ValueError, match="was measured on .*choose another --output"):
            load_report(path, other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": 1}', "[" * 10**5, '{"format": 2}'])
def test_what_is_no_report_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    told = "has format 2, this version reads 1: use" if "format" in text else "is not a .*report"
    with pytest.raises(ValueError, match=rf"a\.json {told}"):
        load_report(path, {})
