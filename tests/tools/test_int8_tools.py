"""The tools that measure models in 8 bits: figures, resuming, failing toolkits, command lines."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from zoo import small

import backbones

TOOLS = Path(__file__).parents[2] / "tools"
NAMES = (
    *("int8_accuracy", "int8_peers", "int8_contenders", "trained_runs", "benchmark"),
    *("benchmark_report", "measuring", "op_kinds", "peers", "runtimes"),
)


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(TOOLS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(TOOLS))
        for name in NAMES:
            sys.modules.pop(name, None)


def network(family: str = "shvit") -> Any:
    return small(family, num_classes=10).eval()


def digits(tools: dict[str, ModuleType], count: int = 5) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    return tools["trained_runs"].Digits(network(), images[:2], images, torch.arange(count))


def test_agreement_and_top1(tools: dict[str, ModuleType]) -> None:
    exact = torch.eye(4)
    other = exact[[0, 1, 2, 0]]
    found = tools["int8_accuracy"].compare(other, exact, torch.tensor([0, 1, 3, 3]))
    assert found["top1"] == 50 and found["agreement"] == 75
    assert found["error"] == pytest.approx((2 / 4) ** 0.5)


def test_batches_are_filled_up(tools: dict[str, ModuleType]) -> None:
    shapes = []

    def run(images: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return images.flatten(1).sum(1, keepdim=True)

    images = torch.arange(5.0).reshape(5, 1, 1, 1)
    assert tools["int8_accuracy"].predict(run, images, 2).flatten().tolist() == [0, 1, 2, 3, 4]
    assert shapes == [(2, 1, 1, 1)] * 3


def test_the_row_of_a_classifier(tools: dict[str, ModuleType]) -> None:
    row = tools["int8_accuracy"].of_digits(digits(tools))
    assert (row["images"], row["calibration_images"]) == (5, 2)
    assert list(row["forms"]) == ["float32", *tools["int8_accuracy"].FORMS]
    assert row["forms"]["float32"]["agreement"] == 100
    assert row["forms"]["fused"]["error"] < 1e-4
    for label in ("int8", "int8_calibrated"):
        figures = row["forms"][label]
        assert "reason" in figures or 0 < figures["quantized"] <= row["layers"]
        assert figures["error"] < 0.2


def test_the_row_of_a_restorer(tools: dict[str, ModuleType]) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = tuple(torch.rand(3, side, side, generator=generator) for side in (16, 32))
    model = small("hat").eval()
    row = tools["int8_accuracy"].of_pictures(
        tools["trained_runs"].Pictures(model, [pair[0].unsqueeze(0)], [pair])
    )
    exact = row["forms"]["float32"]["psnr"]
    assert row["forms"]["fused"]["psnr"] == pytest.approx(exact, abs=0.01)
    assert row["forms"]["int8"]["psnr"] == pytest.approx(exact, abs=0.5)


def test_a_form_that_fails_is_recorded(
    tools: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, images: Any) -> Any:
        raise ValueError("not today\nnor tomorrow")

    monkeypatch.setitem(tools["int8_accuracy"].FORMS, "int8", fail)
    forms = tools["int8_accuracy"].of_digits(digits(tools))["forms"]
    assert forms["int8"] == {"failed": "ValueError: not today"} and "top1" in forms["bfloat16"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of the smallest SHViT, untrained."""
    folder = tmp_path / "runs" / "shvit_s1"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = backbones.create_model("shvit_s1", num_classes=10)
    save_file(model.state_dict(), folder / "best.safetensors")
    text = "model: shvit_s1\ndata: digits\nimg_size: 32\nworkers: 4\n"
    (folder / "config.yaml").write_text(text)
    return folder.parent


def test_a_run_has_its_images(tools: dict[str, ModuleType], run_folder: Path) -> None:
    run = tools["trained_runs"].digits_run(run_folder, "shvit_s1")
    assert not run.model.training
    assert run.calibration.shape == (64, 3, 32, 32)
    assert run.images.shape == (355, 3, 32, 32) and run.labels.shape == (355,)
    again = tools["trained_runs"].digits_run(run_folder, "shvit_s1")
    assert torch.equal(run.calibration, again.calibration)


def test_accuracy_is_measured_once_per_model(
    tools: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, measured = tools["int8_accuracy"], []

    def measure(name: str, folder: Path) -> dict[str, Any]:
        measured.append(name)
        return {"model": name, "forms": {"float32": {"top1": 50.0}}}

    monkeypatch.setattr(tool, "measure_model", measure)
    monkeypatch.setattr(tool, "train", lambda name, folder: trained.append(name))
    trained: list[str] = []
    (tmp_path / "van_b0").mkdir()
    (tmp_path / "van_b0" / "best.safetensors").touch()
    command = ["--checkpoints", str(tmp_path), "--output", str(tmp_path / "out.json")]
    tool.main([*command, "--models", "van_b0", "vig_t"])
    assert measured == ["van_b0"] and not trained
    tool.main([*command, "--models", "van_b0", "vig_t", "--train", "--resume"])
    assert measured == ["van_b0", "vig_t"] and trained == ["vig_t"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["model"] for row in report["results"]] == ["van_b0", "vig_t"]
    assert report["machine"]["name"] and report["machine"]["instruction_set"]


def test_contenders_that_fail_are_recorded(
    tools: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, calls = tools["int8_peers"], []

    def works(model: Any, images: Any, folder: Path) -> Any:
        calls.append(tuple(images[0].shape))
        return tools["int8_contenders"].Contender(lambda threads: model, 123)

    def fails(model: Any, images: Any, folder: Path) -> Any:
        calls.append("fails")
        raise KeyError("no such operator")

    def crawls(model: Any, images: Any, folder: Path) -> Any:
        def run(images: torch.Tensor) -> torch.Tensor:
            time.sleep(0.5)
            return images

        return tools["int8_contenders"].Contender(lambda threads: run, 123)

    monkeypatch.setattr(tool, "TOOLKITS", {"works": works, "fails": fails, "crawls": crawls})
    monkeypatch.setattr(tool, "digits_run", lambda folder, name: digits(tools))
    monkeypatch.setattr(tools["benchmark"], "MATMUL_SIZE", 64)
    row = tool.of_agreement("shvit_s1", tmp_path, ["works", "fails"])
    assert calls == [(1, 3, 64, 64), "fails"]
    contenders = row["contenders"]
    assert contenders["works"]["agreement"] > 99 and contenders["works"]["bytes"] == 123
    assert contenders["fails"] == {"skipped": "KeyError: 'no such operator'"}
    assert contenders["fused"]["bytes"] > contenders["fused+bfloat16"]["bytes"]

    calls.clear()
    shallow = functools.partial(backbones.create_model, depths=(1, 1, 1))
    monkeypatch.setattr(backbones, "create_model", shallow)
    toolkits = ["works", "fails", "crawls"]
    rows = list(tool.of_speed("shvit_s1", 2, [1], toolkits, 2, 0, 0, 0.4, size=32))
    assert calls == [(2, 3, 32, 32), "fails"]  # quantised once, for both orders
    (speed,) = rows
    assert [speed[key] for key in tool.KEYS] == ["speed", "shvit_s1", 2, 1]
    assert "no such operator" in speed["contenders"]["fails"]["skipped"]
    assert speed["contenders"]["crawls"]["skipped"].startswith("a call takes ")
    assert speed["contenders"]["int8"]["speedup_over"].keys() >= {"works", "int8_calibrated"}
    sizes = [speed["contenders"][label]["bytes"] for label in ("fused", "works")]
    assert sizes[0] > contenders["fused"]["bytes"] and sizes[1] == 123


def test_rows_of_the_output_are_skipped(
    tools: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, measured = tools["int8_peers"], []

    def of_speed(name: str, batch: int, threads: list[int], *_: Any) -> Iterator[dict[str, Any]]:
        for count in threads:
            measured.append((name, batch, count))
            yield {"part": "speed", "model": name, "batch": batch, "threads": count} | {
                "contenders": {"fails": {"skipped": "RuntimeError: no"}}
            }

    monkeypatch.setattr(tool, "of_speed", of_speed)
    command = ["speed", "--models", "van_b0", "--output", str(tmp_path / "out.json"), "--resume"]
    tool.main([*command, "--batches", "1", "--threads", "2"])
    tool.main([*command, "--batches", "1", "8"])
    assert measured == [("van_b0", 1, 2), ("van_b0", 1, 1), ("van_b0", 8, 1), ("van_b0", 8, 2)]
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 4


@pytest.mark.parametrize(
    ("tool", "words", "reason"),
    [
        ("int8_accuracy", ["--checkpoints", "x", "--models", "resnet"], "unknown models resnet"),
        ("int8_peers", ["speed", "--models", "resnet"], "unknown models resnet"),
        ("int8_peers", ["agreement"], "agreement needs --checkpoints"),
        ("int8_peers", ["speed", "--toolkits", "tvm"], "invalid choice: 'tvm'"),
    ],
)
def test_bad_arguments(
    tools: dict[str, ModuleType],
    tool: str,
    words: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        tools[tool].main(words)
    assert reason in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("label", ["onnxruntime_static", "onnxruntime_dynamic"])
def test_onnx_runtime_quantises(tools: dict[str, ModuleType], label: str, tmp_path: Path) -> None:
    model = network("inception_next").fuse(channels_last=False)
    images = list(torch.randn(4, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    contender = tools["int8_contenders"].TOOLKITS[label](model, images, tmp_path)
    with torch.inference_mode():
        exact, got = model(images[0]), contender.start(1)(images[0])
    assert (got - exact).norm() < 0.2 * exact.norm()
    assert contender.size < sum(p.nbytes for p in model.parameters())
