"""The benchmark of `embed` runs, and its page says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ops.cpu import policy

TOOLS = Path(__file__).resolve().parents[2] / "tools"

REPORT = {
    "machine": {"name": "a CPU, 2 cores", "cpu_capability": "AVX2", "torch": "2.13.0"},
    "results": [
        {
            **{"part": "speed", "model": "van_b0", "dtype": "bfloat16", "dim": 256, "cores": 2},
            **{"embed": [50.0, 52.0, 51.0], "script": [17.0, 17.0, 16.0], "ratio": 3.0},
        },
        {"part": "decoding", "model": "simplejpeg", "ms": 1.0, "same": True},
        {"part": "decoding", "model": "normalising", "ms": 0.1, "same": None},
        {
            **{"part": "pipelines", "model": "birder, van_b0", "embed": [50.0]},
            **{"theirs": [10.0], "ratio": 5.0},
        },
        {
            **{"part": "index", "model": "synthetic", "rows": 1_000_000, "dim": 192},
            **{"queries": 200, "build": 800.0, "open": 2.0},
            **{"graph_query_ms": 0.5, "exact": [3.0, 9.0], "hnsw": [2.5, 2.6]},
            **{"bytes": 2**30, "recall": 0.987},
        },
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
    for name in ("benchmark_embed", "embed_index", "embed_page", "embed_pipelines", "measuring"):
        sys.modules.pop(name, None)


def test_the_page_is_that_of_the_measurements(benchmark_embed: ModuleType) -> None:
    report = json.loads(benchmark_embed.OUTPUT.read_text())
    assert benchmark_embed.PAGE.read_text() == benchmark_embed.page(report)


def test_the_page_says_what_was_measured(benchmark_embed: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(REPORT))
    benchmark_embed.main(places(tmp_path))
    text = (tmp_path / "a.md").read_text()
    assert "| `van_b0` | bfloat16 | 51.0 | 17.0 | 3.00 |" in text
    assert "| simplejpeg | 1.00 | yes |" in text
    assert "| normalising | 0.10 | – |" in text
    assert "| birder, van_b0 | 50.0 | 10.0 | 5.00 |" in text
    assert "| `hnsw` | 2.50 | 2.60 | 0.987 |" in text
    assert "800 s of CPU time to build, 1.00 GiB on disk" in text
    assert "| `van_b0` | 50.0 | 49.0 | 2.0 % |" in text
    assert "500 MiB at 10%, 501 MiB at 100% of them" in text
    # 10⁹ images, 25.5 a second and core.
    assert "| `van_b0` | bfloat16 | 10,893 | 10.9 | 0.57 | 5.7 |" in text


def places(folder: Path) -> list[str]:
    return [f"--output={folder / 'a.json'}", f"--page={folder / 'a.md'}"]


def results_in(folder: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((folder / "a.json").read_text())["results"]
    return results


def test_each_result_is_kept_at_once(
    benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark that ends in the middle goes on with the rest."""

    def stopping(folder: Path, rounds: int, models: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        yield {"part": "speed", "model": models[0], "dim": 8, "cores": 2, **figures}
        raise KeyboardInterrupt

    figures = {"embed": [2.0], "script": [1.0], "ratio": 2.0}
    monkeypatch.setitem(benchmark_embed.PARTS, "speed", stopping)
    for name in ("van_b0", "shvit_s1"):
        with pytest.raises(KeyboardInterrupt):
            benchmark_embed.main(["speed", f"--models={name}", *places(tmp_path)])
    assert [result["model"] for result in results_in(tmp_path)] == ["van_b0", "shvit_s1"]


def test_a_graph_is_measured(
    benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sys.modules["embed_index"]
    monkeypatch.setattr(index, "ROWS", 1000)
    monkeypatch.setattr(index, "_IN_SHARD", 600)
    benchmark_embed.main(["index", *places(tmp_path)])
    (result,) = results_in(tmp_path)
    assert result["recall"] > 0.95
    assert result["bytes"] > 4 * index.DIM * 1000


def test_other_packages_are_measured(
    benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that stand in for them: seconds are 10, and 0.01 an image."""
    pipelines = sys.modules["embed_pipelines"]
    program = (
        "import sys, pathlib\n"
        "name, folder, processes = sys.argv[1:]\n"
        "print('loading', name)\n"
        "images = len(list(pathlib.Path(folder).rglob('*.jpg')))\n"
        "print('took', 10 + 0.01 * images, 's')\n"
        "print('done')"
    )
    monkeypatch.setitem(pipelines.PIPELINES, "birder", program)
    monkeypatch.setattr(benchmark_embed, "make_checkpoint", lambda folder, name: folder)
    monkeypatch.setattr(benchmark_embed, "rate_of_embed", lambda photos, checkpoint: 300.0)

    def empty_photos(folder: Path, copies: int) -> Path:
        folder.mkdir()
        for number in range(4 * copies):
            (folder / f"{number}.jpg").touch()
        return folder

    monkeypatch.setattr(benchmark_embed, "make_photos", empty_photos)
    monkeypatch.setattr(benchmark_embed, "IMAGES", 4)
    words = ["pipelines", f"--birder={sys.executable}", "--models=van_b0", "--rounds=1"]
    benchmark_embed.main([*words, *places(tmp_path)])
    (result,) = results_in(tmp_path)
    assert result["theirs"] == pytest.approx([100.0])
    assert result["ratio"] == pytest.approx(3.0)
    monkeypatch.setitem(pipelines.PIPELINES, "birder", "raise ImportError('no birder')")
    with pytest.raises(RuntimeError, match=r"(?s)birder does not run for van_b0: .*no birder"):
        benchmark_embed.main([*words, *places(tmp_path)])


def test_pipelines_need_an_environment(
    benchmark_embed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark_embed.main(["pipelines", *places(tmp_path)])
    assert "pipelines needs --birder PYTHON" in capsys.readouterr().err


def test_decoders_are_measured(
    benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = benchmark_embed.make_photos
    monkeypatch.setattr(
        benchmark_embed, "make_photos", lambda folder, copies, count: plain(folder, 1, count=2)
    )
    monkeypatch.setattr(benchmark_embed, "_network", lambda folder, batch: (len, batch))
    benchmark_embed.main(["decoding", "--rounds=1", *places(tmp_path)])
    results = results_in(tmp_path)
    assert {r["model"] for r in results if r["same"]} >= {
        "embed's decoding",
        "Pillow",
        "simplejpeg",
        "torchvision.io.decode_jpeg",
        "embed's resizing and cropping",
    }
    assert not [r for r in results if r["same"] is False and r["model"] != "pyvips"]


@pytest.mark.slow
def test_embed_and_the_script_are_measured(
    benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = benchmark_embed.make_photos
    monkeypatch.setattr(
        benchmark_embed, "make_photos", lambda folder, copies: plain(folder, 1, count=160)
    )
    benchmark_embed.main(["speed", "--rounds=1", "--models=shvit_s1", *places(tmp_path)])
    results = results_in(tmp_path)
    dtypes = ["float32", "bfloat16"][: 1 + policy.multiplies(torch.bfloat16)]
    assert [result["dtype"] for result in results] == dtypes
    assert all(result["ratio"] > 0 for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ray", "memory"])
def test_the_other_parts_run(
    part: str, benchmark_embed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    plain = benchmark_embed.make_photos

    def few(folder: Path, copies: int, **options: Any) -> Path:
        count = {"ray": 80, "memory": 15}[part]
        return plain(folder, copies, **{**options, "count": count})

    monkeypatch.setattr(benchmark_embed, "make_photos", few)
    benchmark_embed.main([part, "--rounds=1", "--models=shvit_s1", *places(tmp_path)])
    (result,) = results_in(tmp_path)
    assert result.get("rows") == 3000 if part == "memory" else result["ray"][0] > 0
