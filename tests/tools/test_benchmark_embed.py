"""Benchmarks of `embed` measure what they say and keep what they measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ops.cpu import policy


@pytest.fixture
def run(tool: ModuleType, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """A function that measures with some words, and returns the results so far."""

    def measure(*words: str) -> list[dict[str, Any]]:
        tool.embedding([*words, f"--output={tmp_path / 'a.json'}"])
        results: list[dict[str, Any]] = json.loads((tmp_path / "a.json").read_text())["results"]
        return results

    return measure


def test_each_result_is_kept_at_once(tool, run, tmp_path, monkeypatch):
    """A benchmark that ends in the middle goes on with the rest."""

    def stopping(
        folder: Path, rounds: int, models: tuple[str, ...], count: int
    ) -> Iterator[dict[str, Any]]:
        yield {"part": "speed", "model": models[0], "dim": 8, "cores": 2, **figures}
        if models[0] != "shvit_s2":
            raise KeyboardInterrupt

    figures = {"embed": [2.0], "script": [1.0], "ratio": 2.0}
    monkeypatch.setattr(tool, "measure_speed", stopping)
    for name in ("van_b0", "shvit_s1"):
        with pytest.raises(KeyboardInterrupt):
            run("speed", f"--models={name}")
    found = run("speed", "--models=shvit_s2")
    assert [result["model"] for result in found] == ["van_b0", "shvit_s1", "shvit_s2"]


def test_other_packages_are_measured(tool, run, tmp_path, monkeypatch):
    """Programs that stand in for them: seconds are 10, and 0.01 an image."""
    program = (
        "import sys, pathlib\n"
        "name, folder, processes = sys.argv[1:]\n"
        "print('loading', name)\n"
        "images = len(list(pathlib.Path(folder).rglob('*.jpg')))\n"
        "print('took', 10 + 0.01 * images, 's')\n"
        "print('done')"
    )
    monkeypatch.setitem(tool.CONTENDERS["embed"], "birder", program)
    monkeypatch.setattr(tool, "make_checkpoint", lambda folder, name: folder)
    monkeypatch.setattr(tool, "rate_of_embed", lambda photos, checkpoint, rows: 300.0)

    def empty_photos(folder: Path, copies: int, count: int) -> Path:
        folder.mkdir()
        for number in range(count * copies):
            (folder / f"{number}.jpg").touch()
        return folder

    monkeypatch.setattr(tool, "make_photos", empty_photos)
    python = f"--birder={sys.executable}"
    words = ["pipelines", python, "--models=van_b0", "--rounds=1", "--images=32"]
    (result,) = run(*words)
    assert result["theirs"] == pytest.approx([100.0])
    assert result["ratio"] == pytest.approx(3.0)
    monkeypatch.setitem(tool.CONTENDERS["embed"], "birder", "raise ImportError('no birder')")
    with pytest.raises(RuntimeError, match=r"(?s)birder does not run for van_b0: .*no birder"):
        run(*words)


def test_decoders_are_measured(tool, run, tmp_path, monkeypatch):
    plain = tool.make_photos
    monkeypatch.setattr(
        tool, "make_photos", lambda folder, copies, count: plain(folder, 1, count=2)
    )
    monkeypatch.setattr(tool, "make_checkpoint", lambda folder, name: folder)
    monkeypatch.setattr(tool, "Network", lambda *args: _Network())
    results = run("decoding", "--rounds=1")
    assert {r["model"] for r in results if r["same"]} >= {
        "embed's decoding",
        "Pillow",
        "simplejpeg",
        "torchvision.io.decode_jpeg",
        "embed's resizing and cropping",
    }
    assert not [r for r in results if r["same"] is False and r["model"] != "pyvips"]


class _Network:
    def prepare(self, *arguments: object) -> None:
        pass

    def __call__(self, batch: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shvit_s1", "timm/test_resnet"])
def test_embed_and_the_script_are_measured(model, tool, run, tmp_path):
    words = ["speed", "--rounds=1", "--images=64", f"--models={model}"]
    results = run(*words)
    dtypes = ["float32", "bfloat16"][: 1 + policy.multiplies(torch.bfloat16)]
    assert [result["dtype"] for result in results] == dtypes
    assert all(result["ratio"] > 0 for result in results)
    if model.startswith("timm/"):  # the same weights
        assert all(result["cosine"] > 0.999 for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ray", "memory"])
def test_the_other_parts_run(part, tool, run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    plain = tool.make_photos

    def few(folder: Path, copies: int, **options: Any) -> Path:
        count = {"ray": 80, "memory": 15}[part]
        return plain(folder, copies, **{**options, "count": count})

    monkeypatch.setattr(tool, "make_photos", few)
    (result,) = run(part, "--rounds=1", "--models=shvit_s1")
    assert result.get("rows") == 3000 if part == "memory" else result["ray"][0] > 0
