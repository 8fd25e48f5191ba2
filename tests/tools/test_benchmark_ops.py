"""Benchmarks of operators measure what they say; contenders compute the same as our kernels."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from zoo import small

import backbones
from backbones.cli.contenders import contender
from backbones.common.errors import CommandError
from ops.neighborhood import NeighborhoodAttention2D
from ops.selective_scan import selective_scan

CPU = torch.device("cpu")


def test_writes_figures(tool, tmp_path, monkeypatch):
    setting = tool.Setting((9, 8), (3, 3), 8)
    monkeypatch.setattr(tool, "SETTINGS", [setting])
    output = tmp_path / "runs" / "na"
    tool.neighborhood(
        ["--batch", "1", "--dtype", "float32", "--rounds", "3", "--output", str(output)]
        + ["--against", "tiled", "gather", "triton", "sdpa-mask", "--max-gib", "1e-4"]
    )
    report = json.loads(output.with_suffix(".json").read_text())
    assert [row["backward"] for row in report["results"]] == [False, True]
    for row in report["results"]:
        contenders = row["contenders"]
        assert contenders["tiled"]["speedup_over_tiled"] == 1
        assert contenders["tiled"]["milliseconds"] > 0
        assert contenders["tiled"]["rounds"] == 3
        assert "CUDA" in contenders["triton"]["skipped"]
        assert "GiB" in contenders["gather"]["skipped"]
    assert [p.suffix for p in output.parent.iterdir()] == [".json"]


def test_runs_in_pieces_add_up(tool, tmp_path, monkeypatch):
    large, small = (tool.Setting((n, n), (3, 3), 4) for n in (6, 4))
    file, measured = tmp_path / "na.json", []

    def measure(setting, batch, dtype, backward, *rest):
        measured.append(setting.name)
        row = {"setting": setting.name, "batch": batch, "dtype": "float32", "backward": backward}
        # What is measured so far is in the file already.
        known = json.loads(file.read_text())["results"] if file.exists() else []
        return row | {"contenders": {}, "known": len(known)}

    monkeypatch.setattr(tool, "SETTINGS", [large, small])
    monkeypatch.setattr(tool, "measure", measure)
    once = ["--batch", "1", "--dtype", "float32", "--output", str(tmp_path / "na")]
    tool.neighborhood([*once, "--settings", small.name])
    tool.neighborhood([*once, "--settings", large.name, "--direction", "both"])
    tool.neighborhood([*once, "--resume"])
    assert measured == [small.name] * 2 + [large.name] * 2
    report = json.loads(file.read_text())
    order = [(name, backward) for name in (large.name, small.name) for backward in (False, True)]
    assert [tool.row_key(row)[::3] for row in report["results"]] == order
    assert [row["known"] for row in report["results"]] == [3, 2, 0, 1]
    tool.neighborhood([*once, "--settings", small.name])
    assert len(json.loads(file.read_text())["results"]) == 4
    file.write_text(json.dumps(report | {"machine": {"name": "another"}}))
    with pytest.raises(CommandError, match="another --output"):
        tool.neighborhood(once)


def test_slow_contenders_are_timed_once_and_the_slowest_skipped(tool):
    names = ("tiled", "gather", "sdpa-mask")

    def measure(seconds, turn_ms, expected) -> dict:
        effort = tool.Effort(rounds=4, seconds=seconds, turn_ms=turn_ms)
        setting = tool.Setting((6, 5), (3, 3), 4)
        row = tool.measure(setting, 1, torch.float32, False, names, CPU, effort, expected)
        return row["contenders"]

    contenders = measure(0.0, 0.0, {"gather": 21.4})
    reason = "about 21 s per call, extrapolated from a smaller batch"
    assert contenders["gather"] == {"skipped": reason}
    assert contenders["sdpa-mask"]["rounds"] == 1
    assert contenders["sdpa-mask"]["milliseconds"] > 0
    contenders = measure(9.0, 1.0, {"gather": 1.0})
    assert [contenders[name]["rounds"] for name in names] == [4, 4, 4]
    # Of two contenders, times_ours is the one over the other.
    assert tool.ratio([2.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == 3 and tool.ratio([4.0], [1.0, 3.0]) == 2


@pytest.mark.parametrize(
    ("name", "rounds", "limit"), [("cpu", 3, 0.05), ("tiled", 1, 0.05), ("both", 3, 9.0)]
)
def test_calls_are_timed_without_their_compilation(tool, monkeypatch, name, rounds, limit):
    """By a clock that stands still between them; all but the first take 1 ms, ``tiled`` 3."""
    now = [0.0]

    def contender(seconds):
        calls = iter([0.1])

        def attend(query, key, value):
            now[0] += next(calls, seconds)
            return query

        return lambda *args: attend

    def read():
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr(time, "perf_counter", read)
    for known, seconds in (("cpu", 1e-3), ("tiled", 3e-3)):
        monkeypatch.setitem(tool.CONTENDERS["neighborhood"], known, contender(seconds))
    effort = tool.Effort(rounds=3, seconds=limit, turn_ms=0.0)
    setting, names = tool.Setting((4,), (3,), 4), ("cpu", "tiled") if name == "both" else (name,)
    found = tool.measure(setting, 1, torch.float32, False, names, CPU, effort, {})["contenders"]
    assert {found[known]["rounds"] for known in names} == {rounds}
    if name == "both":
        ratios = found["tiled"]["times_ours"], found["cpu"]["speedup_over_tiled"]
        assert ratios == pytest.approx((3, 3), rel=0.01)


def made(contenders: ModuleType, name: str, setting: object) -> Callable[..., torch.Tensor]:
    return contenders.CONTENDERS["neighborhood"][name](setting, CPU)


@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation"),
    [((11,), (4,), 2), ((8, 7), (3, 3), 2), ((3, 5, 4), (2, 3, 4), 1)],
)
def test_contenders_compute_the_same(contenders, size, kernel_size, dilation):
    setting = contenders.Setting(size, kernel_size, 8, dilation)
    tensors = torch.randn(3, 2, *size, contenders.NUM_HEADS, 8)
    true = made(contenders, "gather", setting)(*tensors)
    for name in ("tiled", "sdpa-mask", "split"):
        torch.testing.assert_close(made(contenders, name, setting)(*tensors), true)
    # Twice a multiplication and an addition for each number of keys and values in a window.
    operations = 4 * 2 * contenders.NUM_HEADS * math.prod(size) * math.prod(kernel_size) * 8
    assert setting.flops(batch=2, backward=False) == operations


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_flex_attention_is_compiled_for_every_setting(contenders):
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for size, kernel_size in (((12,), (5,)), ((8, 6), (3, 3)), ((4, 5, 6), (2, 3, 3))):
            setting = contenders.Setting(size, kernel_size, 16)
            tensors = torch.randn(3, 1, *size, contenders.NUM_HEADS, 16)
            out = made(contenders, "flex", setting)(*tensors)
            true = made(contenders, "gather", setting)(*tensors)
            torch.testing.assert_close(out, true)


def test_scans(tools, tool, tmp_path, monkeypatch):
    page = tools("tables_ops")
    networks = {"vig_t": lambda: torch.ones(1), "deit_tiny": lambda: torch.ones(1)}
    monkeypatch.setattr(tool, "TOKENS", (5, 9))
    monkeypatch.setattr(tool, "networks", lambda: networks)
    monkeypatch.setattr(tool, "steady", lambda run, *_: [run().numel() * 1e-6])
    output = tmp_path / "scans.json"
    monkeypatch.setitem(sys.modules, "fla", None)
    tool.gated(["--output", str(output), "--rounds", "2"])
    report = json.loads(output.read_text())
    for found in report["scans"].values():
        assert list(found) == ["cpu", "reference", "chunked"]
        assert all(figures["difference"] < 1e-5 for figures in found.values())
        assert all(figures["times_longer"] == 1 for figures in found.values())
    text = page.scans(report)
    assert "| 5 | 0.960 | 192000 | **1.00× (missed 20)** | 1.00× |" in text
    assert "An image of 1024×1024 takes 0.0 s with fused `vig_t`" in page.scan_networks(report)
    assert "(missed 3)" in page.scan_networks(report)


def test_selective_scans(tools, tool, tmp_path, monkeypatch):
    page = tools("tables_ops")

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
    tool.selective(["--output", str(output), "--rounds", "1"])
    report = json.loads(output.read_text())
    assert [(row["states"], row["tokens"]) for row in report["scans"]] == [
        *((1, 4), (1, 9), (2, 4), (2, 9))
    ]
    for row in report["scans"]:
        found = row["contenders"]
        assert {"cpu", "reference", "chunked", "transformers", "map"} <= found.keys()
        assert all(found[name]["difference"] < 1e-5 for name in found.keys() - {"map"})
    # 4 tokens of 4 · 3 channels: an exponential each for the step and its state, and a logarithm.
    assert report["scans"][0]["bounds"] == {
        "memory": 4 * (3 * 48 + 2 * 16) * 1e-6,
        **{"exponentials": 48 * 4e3 * 1e-6},
    }
    text = page.selective(report)
    assert "| 1 | 4 | 3.000 | 750000 | 6 % of exponentials | **1.00× (missed 20)** |" in text


def test_natten_takes_the_place_of_our_layers(contenders, monkeypatch):
    (label, create), made = contender("natten_0_17", contenders.CONTENDERS["models"]), []
    assert label == "natten_0_17"

    class Layer(NeighborhoodAttention2D):
        def __init__(self, *arguments: object, **options: object) -> None:
            made.append(options)
            super().__init__(*arguments, **options)

    old = SimpleNamespace(__version__="0.17.3", NeighborhoodAttention2D=Layer)
    monkeypatch.setitem(sys.modules, "natten", old)
    models = {name: small(name) for name in ("nat", "vig")}
    monkeypatch.setattr(backbones, "create_model", lambda name: copy.deepcopy(models[name]))
    model = create("nat")
    layers = [m for m in model.modules() if isinstance(m, NeighborhoodAttention2D)]
    assert layers and all(type(layer) is Layer for layer in layers)
    assert {options["rel_pos_bias"] for options in made} == {True}
    assert create("vig") is None
    old.__version__ = "0.21.0"
    with pytest.raises(ImportError, match=r"NATTEN 0\.17 is needed, 0\.21\.0 is installed"):
        create("nat")
