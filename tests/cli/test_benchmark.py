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
from commands import run

import backbones
from backbones.cli import benchmark, timing
from backbones.cli.benchmark import INT8, Row, measure
from backbones.cli.benchmark_report import comparison
from backbones.cli.contenders import Runtime, contender
from backbones.cli.main import main
from backbones.cli.op_kinds import KINDS, kind_of

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


def test_table_and_picture(report):
    text = report.with_suffix(".md").read_text()
    assert text.count("| shvit_s1 |") == 10
    assert report.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert sorted(p.name for p in report.parent.iterdir() if p.name != "__pycache__") == [
        "original.py",
        "out.json",
        "out.md",
        "out.png",
    ]


def test_comparison(report):
    new = json.loads(report.read_text())
    old = json.loads(report.read_text())
    old["results"][0]["contenders"]["fused"]["milliseconds"] *= 2
    del old["results"][1]
    lines = comparison(old, new)
    assert len(lines) == 5
    assert [line for line in lines if " fused:" in line][0].endswith("2.00×")


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
        ("vision_backbones::depthwise_conv2d", [[1, 8, 9, 9], [9, 8]], "depthwise conv"),
        ("vision_backbones::na_cpu_forward", [], "attention"),
        ("aten::linear", [[1, 9, 8], [8, 8]], "matrix products"),
        ("aten::layer_norm", [], "norms"),
        ("aten::gelu", [], "elementwise"),
        ("aten::copy_", [], "moving data"),
        ("aten::reshape", [], "moving data"),
        ("some::wrapper", [], None),
    ],
)
def test_kinds_of_operators(name, shapes, kind):
    assert kind_of(name, shapes) == kind


SHORT = ["--models", "shvit_s1", "--batches", "2", "--rounds", "2", *QUICK]


def test_runs_add_to_one_report(report, tmp_path, monkeypatch):
    output = tmp_path / "more.json"
    output.write_text(report.read_text())
    before = json.loads(report.read_text())["results"]
    monkeypatch.setattr(benchmark, "draw", lambda report, file: None)
    words = [*SHORT, "--against", "timm", "--modes", "fused", "--output", output]
    assert command(*words, "--resume", "--sizes", 64, 96) == 0
    after = json.loads(output.read_text())["results"]
    assert after[:2] == before and [row["size"] for row in after] == [32, 64, 96]
    assert command(*words, "--sizes", 32) == 0
    again = json.loads(output.read_text())["results"]
    assert again[1:] == after[1:] and list(again[0]["contenders"]) == ["fused", "timm"]


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "draw", None)
    words = [*SHORT, "--sizes", 32, "--against", "--modes", "eager"]
    assert command(*words, "--output", tmp_path / "out") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.md"}


def test_a_picture_of_nothing_to_compare_says_so(tmp_path):
    words = [*SHORT, "--sizes", 32, "--against", "--modes", "fused"]
    assert command(*words, "--output", tmp_path / "out") == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_reports_of_other_machines_stay(report, tmp_path, capsys):
    other = json.loads(report.read_text())
    other["machine"]["name"] = "another"
    output = tmp_path / "other.json"
    output.write_text(json.dumps(other))
    assert command("--models", "shvit_s1", "--output", output) == 2
    assert "was measured on" in capsys.readouterr().err


def test_training_has_no_fused_mode():
    row = Row("shvit_s1", 64, 2, 1, "float32", "train")
    measured = measure(row, ["eager", "fused"], {}, rounds=1, seconds=1, turn_seconds=0)
    assert list(measured["contenders"]) == ["eager"]


def test_a_training_step_drops_no_paths():
    model = _create_model("van_b0", depths=(2, 1, 1, 1), drop_path_rate=0.5).train()
    row = Row("van_b0", 64, 2, 1, "float32", "train")
    step = row.run(model, row.images(2))
    rates = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert rates and not any(rates) and step().item() > 0


def test_half_of_the_turns_are_for_each_order():
    made: list[str] = []

    def maker(label: str):
        return lambda name: made.append(label) or torch.nn.AdaptiveAvgPool2d(1)

    row = Row("shvit_s1", 32, 1, 1, "float32", "forward")
    peers = {"first": maker("first"), "second": maker("second")}
    measured = measure(row, [], peers, rounds=3, seconds=1, turn_seconds=0)
    assert made == ["first", "second", "second", "first"] and measured["orders"] == 2
    assert measured["contenders"]["first"]["speedup_over"]["second"] > 0
    made.clear()
    assert measure(row, [], peers, rounds=1, seconds=1, turn_seconds=0)["orders"] == 1
    assert made == ["first", "second"]


def test_a_contender_that_fails_when_made_again_is_named():
    models = iter([torch.nn.AdaptiveAvgPool2d(1)])

    def create(name: str) -> torch.nn.Module:
        for model in models:
            return model
        raise RuntimeError(f"cannot make {name} twice")

    row = Row("shvit_s1", 32, 1, 1, "float32", "forward")
    measured = measure(row, ["eager"], {"once": create}, 2, seconds=1, turn_seconds=0)
    skipped = "RuntimeError: cannot make shvit_s1 twice"
    assert measured["contenders"]["once"] == {"skipped": skipped}
    assert measured["contenders"]["eager"]["calls"] > 0


def test_bad_peers(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        contender(str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match="No module named"):
        contender("no_such_package_anywhere")
    with pytest.raises(ValueError, match="json has no function create_model"):
        contender("json")


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
    images = row.images(2)
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


@pytest.mark.slow
def test_runtimes_that_are_forgotten():
    """Signals are still handled after OpenVINO was collected in another thread.

    What runtimes read goes with the process: not with the module, which tests forget, nor after it.
    """
    script = (
        "import gc, signal, sys, threading\n"
        "from backbones.cli import contenders\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "contenders.openvino_core()\n"
        "folder = contenders.scratch_folder()\n"
        "del contenders, sys.modules['backbones.cli.contenders']\n"
        "del sys.modules['backbones.cli'].contenders\n"
        "thread = threading.Thread(target=gc.collect)\n"
        "thread.start()\n"
        "thread.join()\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "assert folder.is_dir()\n"
        "print(folder)"
    )
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    said = run(command, 120, env={"PYTHONPATH": str(Path(__file__).parents[2])})
    assert not Path(said.strip().splitlines()[-1]).exists() and "Warning" not in said
    assert "handled" in said


def test_other_runtimes_do_not_train():
    row = Row("shvit_s1", 48, 2, 1, "float32", "train")
    measured = measure(
        row, [], dict([contender("onnxruntime")]), rounds=1, seconds=1, turn_seconds=0
    )
    assert "skipped" in measured["contenders"]["onnxruntime"]


def test_int8_is_a_mode():
    row = Row("shvit_s1", 32, 2, 1, "float32", "forward")
    found = measure(row, ["eager", "fused", *INT8], {}, rounds=2, seconds=1, turn_seconds=0)
    contenders = found["contenders"]
    for mode in INT8:
        assert contenders[mode]["difference_from_eager"] < 0.2
        assert contenders[mode]["bytes"] < contenders["fused"]["bytes"]
        assert contenders["fused"]["speedup_over"][mode] > 0


def test_a_contender_that_takes_too_long_is_left_out():
    def crawl(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return images

    prepared: list[tuple[int, ...]] = []

    def prepare(name: str, shape: tuple[int, ...]) -> Any:
        prepared.append(shape)
        return (lambda threads: crawl), 123

    row = Row("shvit_s1", 32, 1, 1, "float32", "forward")
    peers = {"slow": partial(Runtime, prepare)}
    limited = partial(measure, row, ["fused"], peers, rounds=2, seconds=0, turn_seconds=0)
    skipped = limited(max_seconds=0.05)["contenders"]["slow"]["skipped"]
    assert skipped.startswith("a call takes ") and len(prepared) == 1
    figures = limited()["contenders"]["slow"]
    assert figures["bytes"] == 123 and figures["milliseconds"] >= 100
    assert prepared[1:] == [(1, 3, 32, 32)] * 2


def test_a_contender_that_fails_is_named():
    def create(name: str) -> None:
        raise RuntimeError(f"cannot make {name}")

    row = Row("shvit_s1", 32, 1, 1, "float32", "forward")
    measured = measure(row, ["eager"], {"broken": create}, rounds=1, seconds=1, turn_seconds=0)
    assert measured["contenders"]["broken"] == {"skipped": "RuntimeError: cannot make shvit_s1"}
