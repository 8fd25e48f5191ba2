"""The page of neighborhood attention states for every target whether it is met."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("performance_neighborhood")


def row(size: tuple[int, ...], *, batch: int = 1, backward: bool = False, **times: float) -> dict:
    ours = {"milliseconds": 2.0, "fraction_of_matmul": 0.3, "peak_bytes": 300, "times_ours": 1.0}
    return {
        "setting": "x".join(map(str, size)),
        "size": list(size),
        "batch": batch,
        "dtype": "float32",
        "backward": backward,
        "input_bytes": 200,
        "contenders": {
            "cpu": ours,
            "triton": {"skipped": "no GPU"},
            **{name.replace("_", "-"): {"times_ours": times[name]} for name in times},
            "natten": {"skipped": "needs 8.0 GiB or more"},
        },
    }


def report(*rows: dict) -> dict:
    machine = {"name": "A CPU", "cpu_capability": "AVX2", "threads": 1, "torch": "2"}
    return {"machine": {**machine, "device": "cpu"}, "results": list(rows)}


def test_aims(page: ModuleType) -> None:
    rows = [
        row((56, 56), tiled=4.0, sdpa_mask=20.5),
        row((28, 28), tiled=3.75, sdpa_mask=5.0),
        row((28, 28), batch=8, tiled=2.5),
        row((64,), tiled=2.25),
        row((128, 128), backward=True, tiled=12.25),
    ]
    rows[0]["contenders"]["cpu"]["fraction_of_matmul"] = 0.5
    rows[2]["contenders"]["gather"] = {
        "skipped": "about 21 s per call, extrapolated from a smaller batch"
    }
    text = page.of_neighborhood(report(*rows), "na.png")
    lines = text.splitlines()
    missed = "**missed in 2 of 3** | 2.50× `28x28` batch 8, 3.75× `28x28` |"
    assert f"| 4× `tiled` in 2-D and 3-D | forward | {missed}" in lines
    assert "| 2× `tiled` in 1-D | forward | met | 2.25× `64` |" in lines
    assert "| 5× `sdpa-mask` at 28² | forward | met | 5.00× `28x28` |" in lines
    assert "| 25 % of matmul at 28² and larger | forward | met | 30.0 % `28x28` |" in lines
    assert "| 2× `tiled` | forward and backward | met | 12.2× `128x128` |" in lines
    memory = (
        "| at most 2× the inputs' memory at 128² | forward and backward | met | 1.50× `128x128` |"
    )
    assert memory in lines
    # What was not measured is neither met nor missed.
    assert "50× `gather`" not in text and "60× `natten`" not in text
    assert "Nothing here ran on a GPU" in text and "](na.png)" in text


def test_memory_is_missed_above(page: ModuleType) -> None:
    large = row((128, 128), backward=True)
    large["contenders"]["cpu"]["peak_bytes"] = 410
    text = page.of_neighborhood(report(large), "na.png")
    assert "**missed in 1 of 1** | 2.05× `128x128` |" in text


def test_table(page: ModuleType) -> None:
    rows = [row((56, 56), tiled=4.04), row((28, 28), batch=8, tiled=2.0)]
    rows[1]["contenders"]["tiled"] = {
        "skipped": "about 21 s per call, extrapolated from a smaller batch"
    }
    text = page.of_neighborhood(report(*rows), "na.png")
    assert "### Forward, float32, batch 1" in text
    assert "| Setting | ours, ms | of matmul | memory | tiled | natten |" in text
    assert "| `56x56` | 2.00 | 30 % | 1.5× | 4.0× | 8 GiB |" in text
    assert "| `28x28` | 2.00 | 30 % | 1.5× | 21 s | 8 GiB |" in text


def test_split_functions_that_miss_their_aim_are_marked(page: ModuleType) -> None:
    rows = [row((28, 28)), row((56, 56), backward=True)]
    for found, theirs in zip(rows, (24.0, 9.0), strict=True):
        found["contenders"] |= {
            "natten-split": {"milliseconds": theirs},
            "split": {"milliseconds": 3.0},
        }
    lines = page.of_split(report(*rows)).splitlines()
    assert "| `28x28` | forward | 24.00 | 3.00 | 8.0× | 2.00 |" in lines
    assert "| `56x56` | forward and backward | 9.00 | 3.00 | **3.0×** | 2.00 |" in lines
