"""The page on 8 bits says what its reports hold, and which targets were missed."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
MACHINE = {"name": "a CPU", "instruction_set": "amx", "torch": "2.13.0"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("int8_page")


def form(top1: float, agreement: float, error: float = 0.01, **more: Any) -> dict[str, Any]:
    return {"top1": top1, "agreement": agreement, "error": error, **more}


ACCURACY = {
    "machine": MACHINE,
    "results": [
        {
            "model": "van_b0",
            "family": "van",
            "kind": "digits",
            "images": 400,
            "calibration_images": 64,
            "layers": 9,
            "forms": {
                "float32": form(98.0, 100.0, 0.0),
                "fused": form(98.0, 100.0, 0.0),
                "bfloat16": form(97.0, 98.0),
                "int8": form(97.7, 99.0, quantized=8),
                "int8_calibrated": form(97.5, 99.5, quantized=7),
            },
        },
        {
            "model": "biformer_tiny",
            "family": "biformer",
            "kind": "digits",
            "images": 400,
            "calibration_images": 64,
            "forms": {
                "float32": form(90.0, 100.0, 0.0),
                "fused": form(90.0, 100.0, 0.0),
                "bfloat16": form(90.25, 99.75),
                "int8": {"failed": "ValueError: no"},
                "int8_calibrated": {"failed": "ValueError: no"},
            },
        },
        {
            "model": "hat_nano_x2",
            "family": "hat",
            "kind": "pictures",
            "images": 3,
            "calibration_images": 9,
            "layers": 20,
            "forms": {
                "float32": {"psnr": 35.3},
                "fused": {"psnr": 35.3},
                "bfloat16": {"psnr": 35.28},
                "int8": {"psnr": 35.25, "quantized": 12},
                "int8_calibrated": {"psnr": 35.0, "quantized": 12},
            },
        },
    ],
}


def timed(milliseconds: float, over: dict[str, float], size: int = 4_000_000) -> dict[str, Any]:
    return {"milliseconds": milliseconds, "speedup_over": over, "bytes": size}


VERSIONS = {"nncf": "3.4", "openvino": "2026.4", "onnxruntime": "1.32", "torchao": "0.18"}
PEERS = {
    "machine": MACHINE,
    "results": [
        {
            "part": "speed",
            "model": "shvit_s4",
            "size": 224,
            "batch": 1,
            "threads": 1,
            "versions": VERSIONS,
            "contenders": {
                "fused": timed(16.0, {"int8": 0.25, "int8_calibrated": 0.3}, 16_000_000),
                "fused+bfloat16": timed(6.0, {"int8": 0.66, "int8_calibrated": 0.8}, 8_000_000),
                "int8": timed(4.0, {"openvino_nncf": 0.9, "onnxruntime_static": 3.0}),
                "int8_calibrated": timed(4.5, {"openvino_nncf": 0.8, "onnxruntime_static": 2.5}),
                "openvino_nncf": timed(3.6, {}, 4_500_000),
                "onnxruntime_static": timed(12.0, {}, 4_600_000),
                "pt2e_x86": {"skipped": "ValueError: it has |\n more than one output"},
            },
        },
        {
            "part": "agreement",
            "model": "shvit_s1",
            "batch": 1,
            "threads": 1,
            "calibration_images": 64,
            "versions": VERSIONS,
            "contenders": {
                "float32": form(98.0, 100.0, 0.0),
                "int8": form(98.5, 99.25),
                "openvino_nncf": form(96.0, 97.0),
                "pt2e_x86": {"skipped": "ValueError: it has |\n more than one output"},
            },
        },
    ],
}


def rows(text: str, start: str) -> list[list[str]]:
    found = [line for line in text.splitlines() if line.startswith(start)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_accuracy_and_what_misses_its_target(tool: ModuleType) -> None:
    text = tool.of_int8([ACCURACY], None)
    (van,) = rows(text, "| van |")
    assert van[:5] == ["van", "`van_b0`", "7/8 of 9", "98.00", "+0.00 (100.0)"]
    assert van[5:] == ["−1.00 (98.0)", "−0.30 (99.0)", "**−0.50 (99.5)**"]
    (biformer,) = rows(text, "| biformer |")
    assert biformer[2] == "–" and biformer[-2:] == ["–", "–"]
    flat = " ".join(text.split())
    assert "`int8` meets both in 1 of 1 models; `int8, calibrated` meets both in 0 of 1" in flat
    assert "400 validation images, of which one is worth 0.25 points" in flat
    assert text.index("| biformer |") < text.index("| van |")
    (psnr,) = rows(text, "| amx |")
    assert psnr[1:] == [
        *("12 of 20", "35.30", "35.30 (+0.000)", "35.28 (−0.020)"),
        *("35.25 (−0.050)", "**35.00 (−0.300)**"),
    ]
    assert "- `biformer_tiny`, int8: `ValueError: no`\n" in text
    assert "other toolkits" not in text


def test_a_table_for_each_instruction_set(tool: ModuleType) -> None:
    other = copy.deepcopy(ACCURACY)
    other["machine"]["instruction_set"] = "avx512"
    other["results"][0]["forms"]["int8"]["top1"] = 90.0
    text = tool.of_int8([ACCURACY, other], None)
    assert [row[6] for row in rows(text, "| van |")] == ["−0.30 (99.0)", "**−8.00 (99.0)**"]
    assert text.index("### With amx") < text.index("### With avx512")
    assert [row[1] for row in rows(text, "| avx512 |")] == ["12 of 20"]
    assert text.count("## Restoration") == 1


def test_other_toolkits(tool: ModuleType) -> None:
    text = tool.of_int8([], PEERS)
    (head,), (speed, sizes) = rows(text, "| ms |"), rows(text, "| `shvit_s4` |")
    assert len(head) == len(speed)
    assert speed[1:8] == ["16.00", "6.00", "4.00", "4.50", "3.60", "12.00", "–"]
    assert speed[8:] == ["4.00×", "1.52×", "**0.90× (missed 1)**"]
    assert sizes == ["`shvit_s4`", "16.0", "8.0", "4.0", "4.5", "4.6", "–"]
    (agreement,) = rows(text, "| `shvit_s1` |")
    assert agreement[1:] == ["98.00", "–", "+0.50 (99.2)", "–", "−2.00 (97.0)", "–"]
    assert "- `shvit_s4`, PT2E, inductor: `ValueError: it has | more than one output`" in text
    assert "NNCF 3.4 for OpenVINO 2026.4" in text.replace("\n", " ")
    assert "### Batch 1, 1 thread\n" in text


def test_the_committed_page_is_that_of_the_committed_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    page = importlib.import_module("performance_page")
    assert (page.DOCS / page.INT8_PAGE).read_text() == page.int8()
    report = json.loads((page.DOCS / "performance" / "int8_accuracy.json").read_text())
    assert len({row["model"] for row in report["results"]}) == len(report["results"])
