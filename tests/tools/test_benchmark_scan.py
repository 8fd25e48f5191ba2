"""The benchmark of the scan, what the page says of it, and NATTEN's layers as a contender."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from zoo import small

import backbones
from ops.neighborhood import NeighborhoodAttention2D
from ops.selective_scan import selective_scan

TOOLS = Path(__file__).parents[2] / "tools"
LOADED = ("measuring", "performance_models")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield
    for name in LOADED:
        sys.modules.pop(name, None)


def test_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, page = load("benchmark_scan"), load("performance_scans")
    networks = {"vig_t": lambda: torch.ones(1), "deit_tiny": lambda: torch.ones(1)}
    monkeypatch.setattr(tool, "TOKENS", (5, 9))
    monkeypatch.setattr(tool, "networks", lambda: networks)
    monkeypatch.setattr(tool, "steady", lambda run, *_: [run().numel() * 1e-6])
    output = tmp_path / "scans.json"
    tool.main(["--output", str(output), "--rounds", "2"])
    report = json.loads(output.read_text())
    for found in report["scans"].values():
        assert list(found) == [*tool.BACKENDS]
        assert all(figures["difference"] < 1e-5 for figures in found.values())
        assert all(figures["times_longer"] == 1 for figures in found.values())
    text = page.of_scans(report)
    assert "| 5 | 0.960 | 192000 | **1.00× (missed 20)** | 1.00× |" in text
    assert "An image of 1024×1024 takes 0.0 s with fused `vig_t`" in text and "missed 3" in text


def test_selective_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, page = load("benchmark_scan"), load("performance_scans")

    def theirs(u, delta, A, B, C, D, **options):
        return selective_scan(u, delta, A, B[:, None], C[:, None], D, **options)

    stand_in = SimpleNamespace(mamba_selective_scan=theirs)
    monkeypatch.setitem(sys.modules, "transformers.models.mamba.modeling_mamba", stand_in)
    monkeypatch.setattr(tool, "SELECTIVE_TOKENS", (4, 9))
    monkeypatch.setattr(tool, "CHANNELS", {1: 3, 2: 5})
    monkeypatch.setattr(tool, "steady", lambda run, *_: [1e-3 * len(run().shape)])
    byte, each = {"byte": 1.0, "exponential": 1e3}, {"logarithm": 2e3}
    monkeypatch.setattr(tool, "rates", lambda rounds: {**byte, **each})
    output = tmp_path / "selective_scans.json"
    tool.main(["--selective", "--output", str(output), "--rounds", "1"])
    report = json.loads(output.read_text())
    assert [(row["states"], row["tokens"]) for row in report["scans"]] == [
        *((1, 4), (1, 9), (2, 4), (2, 9))
    ]
    for row in report["scans"]:
        found = row["contenders"]
        assert {*tool.BACKENDS, "transformers", "map"} <= found.keys()
        assert all(found[name]["difference"] < 1e-5 for name in found.keys() - {"map"})
    # 4 tokens of 4 · 3 channels: an exponential each for the step and its state, and a logarithm.
    assert report["scans"][0]["bounds"] == {
        "memory": 4 * (3 * 48 + 2 * 16) * 1e-6,
        **{"exponentials": 48 * 4e3 * 1e-6},
    }
    text = page.of_selective(report)
    assert "| 1 | 4 | 3.000 | 750000 | 6 % of exponentials | **1.00× (missed 20)** |" in text


def test_bounds_and_natten() -> None:
    page = load("performance_scans")
    contenders = {
        "eager": {"milliseconds": 2.0, "gflops": 50.0},
        "fused": {
            **{"milliseconds": 1.25, "gflops": 80.0},
            "speedup_over": {"eager": 1.6, "natten_0_17": 46.0},
        },
        "natten_0_17": {"milliseconds": 57.5},
    }
    row = {"model": "nat_mini", "batch": 8, "threads": 1, "dtype": "float32"}
    row["contenders"] = contenders
    row["matmul_gflops"] = {"float32": 90.0}
    assert "| `nat_mini` | 8 | 50 | 80 | 90 | 1.80× | 1.60× |" in page.of_bounds({"results": [row]})
    text = page.of_natten({"`-O3`": {"machine": {"torch": "2.8.0"}, "results": [row]}})
    assert "| `nat_mini` | 8 | `-O3` | 1.2 | 2.0 | 57.5 | 46.00× (10) |" in text


def test_natten_takes_the_place_of_our_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    contender, made = load("natten_0_17"), []

    class Layer(NeighborhoodAttention2D):
        def __init__(self, *arguments: object, **options: object) -> None:
            made.append(options)
            super().__init__(*arguments, **options)

    old = SimpleNamespace(__version__="0.17.3", NeighborhoodAttention2D=Layer)
    monkeypatch.setitem(sys.modules, "natten", old)
    models = {name: small(name) for name in ("nat", "vig")}
    monkeypatch.setattr(backbones, "create_model", lambda name: copy.deepcopy(models[name]))
    model = contender.create_model("nat")
    layers = [m for m in model.modules() if isinstance(m, NeighborhoodAttention2D)]
    assert layers and all(type(layer) is Layer for layer in layers)
    assert {options["rel_pos_bias"] for options in made} == {True}
    assert contender.create_model("vig") is None
    old.__version__ = "0.21.0"
    with pytest.raises(ImportError, match=r"NATTEN 0\.17 is wanted, 0\.21\.0 is installed"):
        contender.create_model("nat")
