"""The benchmark of `embed` runs, and its page says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

REPORT = {
    "machine": {"name": "a CPU, 2 cores", "cpu_capability": "AVX2", "torch": "2.13.0"},
    "results": [
        {
            **{"part": "speed", "model": "van_b0", "dim": 256, "cores": 2},
            **{"embed": [50.0, 52.0, 51.0], "script": [17.0, 17.0, 16.0], "ratio": 3.0},
        },
        {"part": "decoding", "model": "simplejpeg", "ms": 1.0, "same": True},
        {"part": "ray", "model": "van_b0", "local": [50.0], "ray": [49.0], "overhead": 0.02},
        {
            **{"part": "memory", "model": "tiny", "rows": 100_000, "seconds": 60.0},
            "mib": {"10%": 500, "100%": 501},
        },
    ],
}


@pytest.fixture
def benchmark_embed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("benchmark_embed")
    for name in ("benchmark_embed", "measuring"):
        sys.modules.pop(name, None)


def test_the_page_is_that_of_the_measurements(benchmark_embed: ModuleType) -> None:
    report = json.loads(benchmark_embed.OUTPUT.read_text())
    assert benchmark_embed.PAGE.read_text() == benchmark_embed.page(report)


def test_the_page_says_what_was_measured(benchmark_embed: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(REPORT))
    place = [f"--output={tmp_path / 'a.json'}", f"--page={tmp_path / 'a.md'}"]
    benchmark_embed.main(place)
    text = (tmp_path / "a.md").read_text()
    assert "| `van_b0` | 51.0 | 17.0 | 3.00 |" in text
    assert "| simplejpeg | 1.00 | yes |" in text
    assert "| `van_b0` | 50.0 | 49.0 | 2.0 % |" in text
    assert "500 MiB at 10%, 501 MiB at 100% of them" in text
    # 10⁹ images, 25.5 a second and core.
    assert "| `van_b0` | 10,893 | 10.9 | 0.57 | 5.7 |" in text


def test_decoders_are_measured(
    benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = benchmark_embed.make_photos
    monkeypatch.setattr(
        benchmark_embed, "make_photos", lambda folder, copies, count: plain(folder, 1, count=2)
    )
    place = [f"--output={tmp_path / 'a.json'}", f"--page={tmp_path / 'a.md'}"]
    benchmark_embed.main(["decoding", "--rounds=1", *place])
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert {r["model"] for r in results if r["same"]} >= {
        "Pillow, as embed opens it",
        "simplejpeg",
        "torchvision.io.decode_jpeg",
    }


@pytest.mark.slow
def test_embed_and_the_script_are_measured(
    benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = benchmark_embed.make_photos
    monkeypatch.setattr(
        benchmark_embed, "make_photos", lambda folder, copies: plain(folder, 1, count=160)
    )
    place = [f"--output={tmp_path / 'a.json'}", f"--page={tmp_path / 'a.md'}"]
    benchmark_embed.main(["speed", "--rounds=1", "--models=shvit_s1", *place])
    (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert result["ratio"] > 0
