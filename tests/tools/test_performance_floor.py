"""The page of floors compares fused models with the faster plain form."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("performance_floor")


def report(*rows: tuple[str, int, int, dict[str, float]]) -> dict[str, Any]:
    return {
        "machine": {"name": "a CPU", "torch": "2.13.0"},
        "results": [
            {
                "model": model,
                "batch": batch,
                "threads": threads,
                "size": 64 if model.startswith("hat") else 224,
                "contenders": {"fused": {"speedup_over": over} if over else {"skipped": "no"}},
            }
            for model, batch, threads, over in rows
        ],
    }


def test_the_faster_plain_form_counts(floor: ModuleType) -> None:
    measured = report(
        ("van_b0", 1, 1, {"eager": 1.5, "channels_last": 0.96}),
        ("van_b0", 8, 1, {"eager": 1.2, "channels_last": 1.4}),
        ("shvit_s1", 1, 1, {"eager": 0.97, "channels_last": 1.0, "timm": 0.5}),
        ("shvit_s1", 8, 1, {}),
        ("hat_s_x2", 1, 1, {"eager": 1.0, "channels_last": 1.0}),
    )
    assert floor.slower(measured) == [("van_b0", 1, 1, 0.96)]
    text = floor.of_floor({"avx2": measured})
    assert "| model | batch 1, 1 thread | batch 8, 1 thread |" in text
    assert "| `van_b0` | **0.96×** | 1.20× |" in text
    assert "| `shvit_s1` | 0.97× | – |" in text
    assert "images of 224×224 (`hat_s_x2` at batch 1: 64×64)." in text
    assert "Below 0.97: `van_b0` at batch 1 with 1 thread (0.960)." in text
    assert "VISION_BACKBONES_NATIVE_ISA=avx2" in text and "VISION_BACKBONES_NATIVE=0" not in text


def test_settings_keep_their_order(floor: ModuleType) -> None:
    rows = report(("van_b0", 1, 2, {"eager": 1.5, "channels_last": 1.1}))
    text = floor.of_floor(dict.fromkeys(reversed(list(floor.SETTINGS)), rows))
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [f"## With {title}" for title, _ in floor.SETTINGS.values()]
    assert "batch 1, 2 threads" in text
