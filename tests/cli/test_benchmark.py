"""The benchmark of the models measures what it says and writes what it measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import backbones
from backbones.cli import timing
from backbones.cli.benchmark import INT8, Row, measure
from backbones.cli.contenders import Runtime, contender
from backbones.cli.main import main
from backbones.cli.timing import KINDS, kind_of
from ops.cpu.gemm.int8 import not_faster_in_int8

_create_model = backbones.create_model
# A turn is two calls then.
QUICK = ["--turn-ms", "0"]


def _shallow(name: str, **arguments: Any) -> Any:
    """What is measured and exported here has a block without attention and one with it."""
    sizes = {"dims": (64, 96), "depths": (1, 1), "attn_dims": (0, 24)}
    return _create_model(name, **{**sizes, **arguments})


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Where the CPU has no products of bfloat16, 1024 takes seconds.
        patch.setattr(timing, "MATMUL_SIZE", 64)
        patch.setattr(backbones, "create_model", _shallow)
        yield


def command(*words: object) -> int:
    return main(["benchmark", *map(str, words)])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model at two sizes, beside timm and a peer from a file."""
    folder = tmp_path_factory.mktemp("benchmark")
    peer = folder / "original.py"
    peer.write_text(
        "import timm\n\ndef create_model(name):\n    return timm.create_model(name) "
        "if name.startswith('shvit') else None\n"
    )
    words = ["--models", "shvit_s1", "--sizes", 32, 64, "--batches", 2, "--rounds", 3, *QUICK]
    words += ["--against", "timm", peer, "--modes", "eager", "fused", "fused+bfloat16"]
    assert command(*words, "--profile", "--output", folder / "out") == 0
    return folder / "out.json"


def test_rows(report):
    written = json.loads(report.read_text())
    assert written["machine"]["torch"]
    for row, size in zip(written["results"], (32, 64), strict=True):
        assert (row["size"], row["batch"], row["dtype"]) == (size, 2, "float32")
        assert list(row["contenders"]) == ["eager", "fused", "fused+bfloat16", "timm", "original"]
        assert row["matmul_gflops"].keys() == {"float32", "bfloat16"}
        fused = row["contenders"]["fused"]
        assert fused["speedup_over"].keys() == {"eager", "timm", "original"}
        assert fused["difference_from_eager"] < 1e-4
        assert 0 < fused["fastest"] <= fused["milliseconds"] <= fused["p90"] <= fused["p99"]
        assert fused["images_per_second"] == pytest.approx(2e3 / fused["milliseconds"], rel=1e-3)
    small, large = (row["macs"] for row in written["results"])
    assert 2 < large / small < 4  # without the head four times as much


def test_time_by_kind(report):
    for row in json.loads(report.read_text())["results"]:
        for mode in ("eager", "fused", "fused+bfloat16"):
            shares = row["contenders"][mode]["time_by_kind"]
            assert list(shares) == list(KINDS)
            assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
            assert min(shares["matrix products"], shares["depthwise conv"]) > 0
        assert "time_by_kind" not in row["contenders"]["timm"]


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::conv2d", [[1, 8, 9, 9], [8, 1, 3, 3]], "depthwise conv"),
        ("aten::conv2d", [[1, 8, 9, 9], [16, 8, 1, 1]], "matrix products"),
        ("mkldnn::_convolution_pointwise", [[1, 3, 9, 9], [8, 3, 3, 3]], "other conv"),
        ("vision_backbones::na_cpu_forward", [], "attention"),
        ("aten::layer_norm", [], "norms"),
        ("aten::gelu", [], "elementwise"),
        ("aten::reshape", [], "moving data"),
        ("some::wrapper", [], None),
    ],
)
def test_kinds_of_operators(name, shapes, kind):
    assert kind_of(name, shapes) == kind


SHORT = ["--models", "shvit_s1", "--batches", "2", "--rounds", "2", *QUICK]


def test_runs_add_to_one_report(report, tmp_path):
    output = tmp_path / "more.json"
    output.write_text(report.read_text())
    before = json.loads(report.read_text())["results"]
    words = [*SHORT, "--against", "timm", "--modes", "fused", "--output", output]
    assert command(*words, "--resume", "--sizes", 64, 96) == 0
    after = json.loads(output.read_text())["results"]
    assert after[:2] == before and [row["size"] for row in after] == [32, 64, 96]
    assert command(*words, "--sizes", 32) == 0
    again = json.loads(output.read_text())["results"]
    assert again[1:] == after[1:] and list(again[0]["contenders"]) == ["fused", "timm"]


def test_a_training_step_drops_no_paths():
    model = _create_model("van_b0", depths=(2, 1, 1, 1), drop_path_rate=0.5).train()
    row = Row("van_b0", 64, 2, 1, "float32", "train")
    step = row.run(model, row.images())
    rates = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert rates and not any(rates) and step().item() > 0


def small(modes: list[str], peers: dict[str, Any], rounds: int = 1, **more: Any) -> dict[str, Any]:
    """The measurement of a small row."""
    direction = more.pop("direction", "forward")
    row = Row("shvit_s1", 32, 2, 1, "float32", direction)
    return measure(row, modes, peers, rounds, more.pop("seconds", 1), turn_seconds=0, **more)


def test_training_has_no_fused_mode_and_no_other_runtimes():
    peers = dict([contender("onnxruntime")])
    row = small(["eager", "fused"], peers, direction="train")
    found = row["contenders"]
    # Forward and backward, for two images.
    flops = found["eager"]["gflops"] * found["eager"]["milliseconds"] * 1e6
    assert flops == pytest.approx(3 * 2 * 2 * row["macs"])
    assert list(found) == ["eager", "onnxruntime"] and "skipped" in found["onnxruntime"]


class Clock:
    """Stands for the clock: a millisecond passes whenever it is read, and more in calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.made = 0.0, list[str]()
        monkeypatch.setattr(time, "perf_counter", self.read)

    def read(self) -> float:
        self.now += 1e-3
        return self.now

    def peer(self, label: str, first: float, later: float) -> Any:
        """A contender whose first call, which compiles, takes another time than the later ones."""

        def create(name: str) -> torch.nn.Module:
            self.made.append(label)
            model, seconds = torch.nn.AdaptiveAvgPool2d(1), iter([first])

            def call(module: torch.nn.Module, images: Any) -> None:
                self.now += next(seconds, later)

            model.register_forward_pre_hook(call)
            return model

        return create


def test_the_first_call_is_no_part_of_the_times(monkeypatch):
    """Half of the turns are for each order of the contenders."""
    clock = Clock(monkeypatch)
    peers = {"fast": clock.peer("fast", 9.0, 0.5), "slow": clock.peer("slow", 0.1, 1.0)}
    found = small([], peers, rounds=3, seconds=1000)
    assert clock.made == ["fast", "slow", "slow", "fast"] and found["orders"] == 2
    fast, slow = (found["contenders"][name] for name in ("fast", "slow"))
    assert (fast["calls"], slow["calls"]) == (3, 3)
    assert fast["fastest"] == pytest.approx(501) and fast["p99"] == pytest.approx(501)
    assert fast["warm_up_seconds"] == pytest.approx(9.001)
    assert slow["milliseconds"] == pytest.approx(1001)
    assert fast["speedup_over"]["slow"] == pytest.approx(1001 / 501)
    clock.made.clear()
    assert small([], peers, seconds=1000)["orders"] == 1
    assert clock.made == ["fast", "slow"]


def test_a_contender_that_takes_too_long_is_left_out(monkeypatch):
    clock, prepared = Clock(monkeypatch), list[tuple[int, ...]]()

    def crawl(images: torch.Tensor) -> torch.Tensor:
        clock.now += 0.1
        return images

    def prepare(name: str, shape: tuple[int, ...]) -> Any:
        prepared.append(shape)
        return (lambda threads: crawl), 123

    limited = partial(small, ["fused"], {"slow": partial(Runtime, prepare)}, rounds=2)
    skipped = limited(max_seconds=0.05)["contenders"]["slow"]["skipped"]
    assert skipped.startswith("a call takes ") and len(prepared) == 1
    figures = limited()["contenders"]["slow"]
    assert figures["bytes"] == 123 and figures["milliseconds"] >= 100
    assert prepared[1:] == [(2, 3, 32, 32)] * 2


@pytest.mark.parametrize("times", [0, 1])
def test_a_contender_that_fails_is_named(times):
    """When it is made first, or for the other order."""
    models = iter([torch.nn.AdaptiveAvgPool2d(1)] * times)

    def create(name: str) -> torch.nn.Module:
        for model in models:
            return model
        raise RuntimeError(f"cannot make {name}")

    found = small(["eager"], {"broken": create}, rounds=2)["contenders"]
    assert found["broken"] == {"skipped": "RuntimeError: cannot make shvit_s1"}
    assert found["eager"]["calls"] > 0


@pytest.mark.parametrize(
    ("label", "tolerance"),
    [
        ("onnxruntime", 1e-4),
        pytest.param("openvino", 1e-4, marks=pytest.mark.slow),
        pytest.param("openvino_bf16", 0.1, marks=pytest.mark.slow),
    ],
)
def test_other_runtimes_run_our_model(label, tolerance):
    row = Row("shvit_s1", 48, 2, 1, "float32", "forward")
    images = row.images()
    torch.manual_seed(0)
    expected = backbones.create_model("shvit_s1").eval()(images)
    exported = contender(label)[1]("shvit_s1").eval()
    error = (exported(images) - expected).abs().max() / expected.abs().max()
    assert exported(images).dtype == torch.float32 and error < tolerance
    # The same file again: what takes long is to write it.
    peers = {label: lambda name: exported}
    measured = measure(row, ["fused"], peers, rounds=1, seconds=1, turn_seconds=0)
    assert measured["contenders"]["fused"]["speedup_over"].keys() == {label}
    assert measured["versions"].keys() == {label.partition("_")[0]}


def test_int8_is_a_mode():
    contenders = small(["eager", "fused", *INT8], {}, rounds=2)["contenders"]
    for mode in INT8:
        assert contenders[mode]["difference_from_eager"] < 0.2
        in_floats = not_faster_in_int8(torch.device("cpu")) is not None
        sizes = [contenders[name]["bytes"] for name in (mode, "fused")]
        assert sizes[0] == sizes[1] if in_floats else sizes[0] < sizes[1]
        assert contenders["fused"]["speedup_over"][mode] > 0


def test_short_memory_peaks_are_measured():
    with timing.PeakMemory(torch.device("cpu")) as memory:
        torch.ones(1 << 24)
    if sys.platform == "linux":
        assert 0.9 * (1 << 26) < memory.bytes < 1.5 * (1 << 26)
    else:
        assert memory.bytes is None


def test_what_counts_is_the_later_half_of_a_turn(monkeypatch):
    now, taken = [0.0], iter([0.5, 0.5, 0.25, 0.25, 9.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(taken)

    assert timing.steady(run, torch.device("cpu"), 1.5) == [0.25, 0.25]
    assert timing.steady(run, torch.device("cpu"), 9.0) == [7.0]  # of at least two
