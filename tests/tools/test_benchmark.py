"""The benchmark of the models measures what it says and writes what it measured."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import run

import backbones

TOOLS = Path(__file__).parents[2] / "tools"
_create_model = backbones.create_model
# A turn is two calls then.
QUICK = ["--turn-ms", "0"]


def _shallow(name: str, **arguments: Any) -> Any:
    """What is measured and exported here has a block without attention and one with it."""
    sizes = {"dims": (64, 96), "depths": (1, 1), "attn_dims": (0, 24)}
    return _create_model(name, **{**sizes, **arguments})


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("benchmark", TOOLS / "benchmark.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.MATMUL_SIZE = 64  # where the CPU has no products of bfloat16, 1024 takes seconds
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.backbones, "create_model", _shallow)
            yield module
    finally:
        sys.path.remove(str(TOOLS))
        for name in (
            "measuring",
            "benchmark_report",
            "op_kinds",
            "performance_floor",
            "performance_models",
            "peers",
            "runtimes",
        ):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def report(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model at two sizes, beside timm and a peer from a file."""
    folder = tmp_path_factory.mktemp("benchmark")
    peer = folder / "original.py"
    peer.write_text(
        "import timm\n\ndef create_model(name):\n    return timm.create_model(name) "
        "if name.startswith('shvit') else None\n"
    )
    tool.main(
        ["--models", "shvit_s1", "--sizes", "32", "64", "--batches", "2", "--rounds", "3"]
        + ["--against", "timm", str(peer), "--output", str(folder / "out"), "--profile"]
        + ["--modes", "eager", "fused", "fused+bfloat16", *QUICK]
    )
    return folder / "out.json"


def test_rows(report: Path) -> None:
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
        assert fused["images_per_second"] == pytest.approx(2e3 / fused["milliseconds"])
    small, large = (row["macs"] for row in written["results"])
    assert 2 < large / small < 4  # without the head four times as much


def test_table_picture_and_growth(tool: ModuleType, report: Path) -> None:
    text = report.with_suffix(".md").read_text()
    assert text.count("| shvit_s1 |") == 10 and "time grows as pixels to the" in text
    assert report.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert sorted(p.name for p in report.parent.iterdir() if p.name != "__pycache__") == [
        "original.py",
        "out.json",
        "out.md",
        "out.png",
    ]


def test_comparison(tool: ModuleType, report: Path) -> None:
    new = json.loads(report.read_text())
    old = json.loads(report.read_text())
    old["results"][0]["contenders"]["fused"]["milliseconds"] *= 2
    del old["results"][1]
    lines = tool.comparison(old, new)
    assert len(lines) == 5
    assert [line for line in lines if " fused:" in line][0].endswith("2.00×")


def test_time_by_kind(tool: ModuleType, report: Path) -> None:
    for row in json.loads(report.read_text())["results"]:
        for mode in ("eager", "fused", "fused+bfloat16"):
            shares = row["contenders"][mode]["time_by_kind"]
            assert list(shares) == list(tool.KINDS)
            assert sum(shares.values()) == pytest.approx(1)
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
def test_kinds_of_operators(tool: ModuleType, name: str, shapes, kind: str | None) -> None:
    assert tool.kind_of(name, shapes) == kind


def test_runs_add_to_one_report(
    tool: ModuleType, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "more.json"
    output.write_text(report.read_text())
    before = json.loads(report.read_text())["results"]
    with monkeypatch.context() as patch:
        # The second run draws the whole report.
        patch.setattr(tool, "draw", lambda report, path: path.touch())
        tool.main(
            ["--models", "shvit_s1", "--sizes", "64", "96", "--batches", "2", "--rounds", "3"]
            + ["--against", "timm", "--modes", "fused", "--output", str(output), "--resume", *QUICK]
        )
    after = json.loads(output.read_text())["results"]
    assert after[:2] == before and [row["size"] for row in after] == [32, 64, 96]
    tool.main(
        ["--models", "shvit_s1", "--sizes", "32", "--batches", "2", "--rounds", "3"]
        + ["--against", "timm", "--modes", "fused", "--output", str(output), *QUICK]
    )
    again = json.loads(output.read_text())["results"]
    assert again[1:] == after[1:] and list(again[0]["contenders"]) == ["fused", "timm"]


def test_without_matplotlib_there_is_no_picture(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tool, "draw", None)
    tool.main(
        ["--models", "shvit_s1", "--sizes", "32", "--batches", "1", "--rounds", "1"]
        + ["--against", "--modes", "eager", "--output", str(tmp_path / "out"), *QUICK]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.md"}


def test_a_picture_of_nothing_to_compare_says_so(tool: ModuleType, tmp_path: Path) -> None:
    tool.main(
        ["--models", "shvit_s1", "--sizes", "32", "--batches", "1", "--rounds", "1"]
        + ["--against", "--modes", "fused", "--output", str(tmp_path / "out"), *QUICK]
    )
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_reports_of_other_machines_stay(tool: ModuleType, report: Path, tmp_path: Path) -> None:
    other = json.loads(report.read_text())
    other["machine"]["name"] = "another"
    output = tmp_path / "other.json"
    output.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="was measured on"):
        tool.main(["--models", "shvit_s1", "--output", str(output)])


def test_training_has_no_fused_mode(tool: ModuleType) -> None:
    row = tool.Row("shvit_s1", 64, 2, 1, "float32", "train")
    measured = tool.measure(row, ["eager", "fused"], {}, rounds=1, seconds=1, turn_seconds=0)
    assert list(measured["contenders"]) == ["eager"]


def test_half_of_the_turns_are_for_each_order(tool: ModuleType) -> None:
    made: list[str] = []

    def maker(label: str):
        return lambda name: made.append(label) or torch.nn.AdaptiveAvgPool2d(1)

    row = tool.Row("shvit_s1", 32, 1, 1, "float32", "forward")
    peers = {"first": maker("first"), "second": maker("second")}
    measured = tool.measure(row, [], peers, rounds=3, seconds=1, turn_seconds=0)
    assert made == ["first", "second", "second", "first"] and measured["orders"] == 2
    assert measured["contenders"]["first"]["speedup_over"]["second"] > 0
    made.clear()
    assert tool.measure(row, [], peers, rounds=1, seconds=1, turn_seconds=0)["orders"] == 1
    assert made == ["first", "second"]


def test_a_contender_that_fails_is_named(tool: ModuleType) -> None:
    def create(name: str) -> None:
        raise RuntimeError(f"cannot make {name}")

    row = tool.Row("shvit_s1", 32, 1, 1, "float32", "forward")
    measured = tool.measure(row, ["eager"], {"broken": create}, rounds=1, seconds=1, turn_seconds=0)
    assert measured["contenders"]["broken"] == {"skipped": "RuntimeError: cannot make shvit_s1"}


def test_a_contender_that_fails_when_made_again_is_named(tool: ModuleType) -> None:
    models = iter([torch.nn.AdaptiveAvgPool2d(1)])

    def create(name: str) -> torch.nn.Module:
        for model in models:
            return model
        raise RuntimeError(f"cannot make {name} twice")

    row = tool.Row("shvit_s1", 32, 1, 1, "float32", "forward")
    measured = tool.measure(row, ["eager"], {"once": create}, 2, seconds=1, turn_seconds=0)
    skipped = "RuntimeError: cannot make shvit_s1 twice"
    assert measured["contenders"]["once"] == {"skipped": skipped}
    assert measured["contenders"]["eager"]["calls"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "resnet5"], "unknown models resnet5"),
        (["--compare", "nowhere.json"], "there is no file nowhere.json"),
    ],
)
def test_bad_arguments(tool: ModuleType, arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        tool.parse(arguments)
    assert message in capsys.readouterr().err


def test_bad_peers(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        tool.peer(str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match="No module named"):
        tool.peer("no_such_package_anywhere")
    with pytest.raises(ValueError, match="json has no function create_model"):
        tool.peer("json")


@pytest.fixture
def page(tool: ModuleType) -> ModuleType:
    spec = importlib.util.spec_from_file_location("performance_page", TOOLS / "performance_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page(page: ModuleType, report: Path) -> None:
    measured = json.loads(report.read_text())
    empty = {"machine": {**measured["machine"], "threads": 1}, "results": []}
    for row, size in zip(measured["results"], (224, 448), strict=True):
        row.update(model="shvit_s4", size=size, batch=1)
    contenders = measured["results"][0]["contenders"]
    contenders["fused"]["speedup_over"] |= {"original": 1.443, "timm": 0.5}
    contenders["fused+bfloat16"]["speedup_over"]["original"] = 2.9
    text = page.page(page.PAGES[0], empty, measured)
    assert "### Batch 1, 1 thread, float32" in text
    fused = contenders["fused"]["milliseconds"]
    assert f"| {fused:.1f} | {contenders['fused+bfloat16']['milliseconds']:.1f} |" in text
    assert "| `shvit_s4` | original | **1.44× (missed 1.45)** | 2.90× (2.9) | " in text
    assert "| **0.50× (missed 1)** | – |" in text and "NATTEN 0.17.3 |" not in text
    later = measured["results"][1]["contenders"]["fused"]["milliseconds"]
    assert f"| `shvit_s4` | {fused:.1f} | {later:.1f} |" in text
    assert "| `shvit_s4`, fused | " in text and "## Neighborhood attention" in text
    assert "## Models" not in page.page(page.PAGES[0], empty, None)
    contenders["fused"]["speedup_over"]["natten_0_17"] = 21.5
    contenders["fused+bfloat16"]["speedup_over"]["natten_0_17"] = 9.9
    wanted = "| `shvit_s4` | original on NATTEN 0.17.3 | 21.50× (10) | **9.90× (missed 10)** | – |"
    assert wanted in page.page(page.PAGES[0], empty, measured)


def _without_aims(page: ModuleType) -> Any:
    return next(about for about in page.PAGES if not about.has_aims)


def test_a_machine_without_aims(page: ModuleType, report: Path) -> None:
    measured = json.loads(report.read_text())
    empty = {"machine": {**measured["machine"], "threads": 1}, "results": []}
    for row, size in zip(measured["results"], (224, 448), strict=True):
        row.update(model="shvit_s4", size=size, batch=1)
    measured["results"][0]["contenders"]["fused"]["speedup_over"] |= {"original": 1.4, "timm": 0.5}
    text = page.page(_without_aims(page), empty, measured)
    assert "| times faster | than | fused | fused, bf16 | than timm |" in text
    assert "| `shvit_s4` | original | 1.40× | " in text and "| 0.50× | – |" in text
    assert "missed" not in text and f"]({_without_aims(page).folder}/models.png)" in text


def test_a_machine_held_to_fewer_instructions(page: ModuleType, report: Path) -> None:
    measured = json.loads(report.read_text())
    empty = {"machine": {**measured["machine"], "threads": 1}, "results": []}
    row = measured["results"][0]
    row.update(model="van_b0", batch=8)
    row["contenders"]["fused"]["speedup_over"]["original"] = 2.5
    row["contenders"]["fused+bfloat16"]["speedup_over"]["original"] = 2.625
    text = page.page(page.PAGES[1], empty, None, lesser={"avx2": measured})
    assert "### AVX2" in text and "### AVX-512" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("| `van_b0` | 8 | "))
    assert line.endswith(" | original | 2.50× | 2.62× |")
    assert "fewer instructions" not in page.page(page.PAGES[1], empty, None)


def test_beside_other_runtimes(page: ModuleType, report: Path) -> None:
    measured = json.loads(report.read_text())
    empty = {"machine": {**measured["machine"], "threads": 1}, "results": []}
    row = measured["results"][0]
    row.update(model="van_b0", versions={"onnxruntime": "1.32.0", "openvino": "2026.4.1"})
    row["contenders"]["fused"]["speedup_over"].update(onnxruntime=1.5, openvino=0.875)
    row["contenders"]["fused+bfloat16"]["speedup_over"]["openvino_bf16"] = 2.0
    text = page.page(page.PAGES[1], empty, None, runtimes={**measured, "results": [row]})
    assert "ONNX Runtime 1.32.0 and OpenVINO 2026.4.1" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| `van_b0` | 2 | 1 |"))
    assert line.endswith(" | 1.50× (1) | **0.88× (missed 1)** | 2.00× (1) |")


@pytest.mark.parametrize("name", ["performance.md", "performance-zen4.md", "performance-zen5.md"])
def test_the_committed_pages_are_generated(page: ModuleType, name: str) -> None:
    (about,) = (about for about in page.PAGES if about.name == name)
    text = (page.DOCS / name).read_text()
    assert text == page.generate(about) and "## Neighborhood attention" in text


def test_other_runtimes_run_our_model(tool: ModuleType) -> None:
    row = tool.Row("shvit_s1", 48, 2, 1, "float32", "forward")
    images = row.images(2)
    torch.manual_seed(0)
    expected = tool.backbones.create_model("shvit_s1").eval()(images)
    labels = {"onnxruntime": 1e-4, "openvino": 1e-4, "openvino_bf16": 0.1}
    for label, tolerance in labels.items():
        exported = tool.peer(label)[1]("shvit_s1").eval()
        error = (exported(images) - expected).abs().max() / expected.abs().max()
        assert exported(images).dtype == torch.float32 and error < tolerance, label
    measured = tool.measure(
        row, ["fused"], dict(map(tool.peer, labels)), rounds=2, seconds=1, turn_seconds=0
    )
    assert measured["contenders"]["fused"]["speedup_over"].keys() == labels.keys()
    assert measured["versions"].keys() == {"onnxruntime", "openvino"}


def test_runtimes_that_are_forgotten() -> None:
    """Signals are still handled after OpenVINO was collected in another thread.

    What runtimes read goes with the process: not with the module, which tests forget, nor after it.
    """
    script = (
        "import gc, runtimes, signal, sys, threading\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "runtimes.openvino_core()\n"
        "folder = runtimes._folder()\n"
        "del runtimes, sys.modules['runtimes']\n"
        "thread = threading.Thread(target=gc.collect)\n"
        "thread.start()\n"
        "thread.join()\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "assert folder.is_dir()\n"
        "print(folder)"
    )
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    path = os.pathsep.join([str(TOOLS), str(TOOLS.parent)])
    said = run(command, 120, env={"PYTHONPATH": path})
    assert not Path(said.strip().splitlines()[-1]).exists() and "Warning" not in said
    assert "handled" in said


def test_other_runtimes_do_not_train(tool: ModuleType) -> None:
    row = tool.Row("shvit_s1", 48, 2, 1, "float32", "train")
    measured = tool.measure(
        row, [], dict([tool.peer("onnxruntime")]), rounds=1, seconds=1, turn_seconds=0
    )
    assert "skipped" in measured["contenders"]["onnxruntime"]
