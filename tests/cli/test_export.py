"""Exported files reproduce the model, also at sizes that they were not traced with."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
import yaml
from embedding_runs import make_photos
from faults import files_that_may_not_grow
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from zoo import FAMILIES, randomise, small

import backbones
from backbones.cli import graphs
from backbones.cli.export import agreement, calibration_images, export
from backbones.cli.main import main
from backbones.common.errors import CommandError, FileError
from backbones.common.files import save_weights
from backbones.common.outputs import ONNX, PT2, require_writable
from backbones.core.loaded import Loaded, load
from backbones.overlock.blocks import ContextMixing, window_offsets
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

# From a single window, or less, to several at every stage; none divides by much.
SHAPES = [(1, 3, 64, 64), (3, 3, 97, 131), (2, 3, 226, 158), (1, 3, 33, 41)]
# What is exported in every run: SHViT with a stage without attention and one with it.
QUICK = ("shvit", True)
TWO_STAGES = {"dims": (32, 48), "depths": (1, 1), "attn_dims": (0, 16)}


def errors(model: torch.nn.Module, run: graphs.Run, shapes: list) -> list[float]:
    return [found.error for found in graphs.check(model, run, shapes)]


SLOW = [(f, fused) for f in FAMILIES for fused in (False, True) if (f, fused) != QUICK]


@pytest.mark.parametrize(
    ("family", "fused"), [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_family_with_dynamic_sizes(family, fused, tmp_path):
    model = randomise(small(family, **TWO_STAGES if (family, fused) == QUICK else {})).eval()
    if fused:
        model.fuse(channels_last=False)
    program = graphs.trace(model, (1, 3, 96, 160), dynamic=True)
    graphs.save_program(program, tmp_path / "model.pt2")
    if (family, fused) == QUICK:  # it holds no images
        weights = sum(t.nbytes for t in model.state_dict().values())
        assert (tmp_path / "model.pt2").stat().st_size < 1.1 * weights + 1e6
    require_writable({"--out": (tmp_path / "model.pt2", PT2)})  # an earlier result
    assert max(errors(model, graphs.program_runner(tmp_path / "model.pt2"), SHAPES)) < 1e-5
    graphs.save_onnx(program, tmp_path / "model.onnx")
    assert max(errors(model, graphs.onnx_runner(tmp_path / "model.onnx"), SHAPES)) < 1e-5


class Mixing(torch.nn.Module):
    """OverLoCK's dynamic convolution of 13×13, on maps that come in as images."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = randomise(ContextMixing(16, 6, 2, 13))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, x.flip(1), x[:, :6], window_offsets(x.shape[2:], 13, x.device))


def test_maps_that_are_enlarged_or_not(tmp_path):
    """To the sides that the model computes in floating point: 116 for 27 beside 3, not 117."""
    model = Mixing().eval()
    program = graphs.trace(model, (1, 16, 13, 13), dynamic=True)
    graphs.save_onnx(program, tmp_path / "model.onnx")
    shapes = [(2, 16, *size) for size in ((3, 27), (27, 3), (1, 1), (12, 13), (13, 13), (14, 23))]
    for run in (program.module(), graphs.onnx_runner(tmp_path / "model.onnx")):
        assert max(errors(model, run, shapes)) < 1e-5


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    create = functools.partial(backbones.create_model, **TWO_STAGES)
    monkeypatch.setattr(backbones, "create_model", create)


def test_the_command_writes_what_it_says(shallow, tmp_path, capsys):
    path = tmp_path / "shvit.pt2"
    words = ["export", "shvit_s1", "--size", "64", "--fused", "--batch", "2", "--out", str(path)]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.endswith("shvit_s1 is exported untrained\n") and said.err.count("\n") == 1
    _, compared, last = said.out.splitlines()
    assert compared.split()[0] == "2×3×64×64"
    assert "shvit_s1 for images 2×3×64×64, " in last
    assert [p.name for p in tmp_path.iterdir()] == ["shvit.pt2"]


def test_options_reach_the_tracing(shallow, tmp_path, monkeypatch):
    seen: list[Any] = []

    def refuse(model: Any, shape: tuple[int, ...], dynamic: bool) -> None:
        seen.append((model.fused, shape, dynamic))
        raise CommandError("not now")

    monkeypatch.setattr(graphs, "trace", refuse)
    words = ["export", "shvit_s1", "--out", str(tmp_path / "x.pt2")]
    for more in ([], ["--size", "64", "96", "--dynamic"], ["--size", "64", "--fused", "--batch=3"]):
        assert main([*words, *more]) == 2
    shapes = (1, 3, 224, 224), (1, 3, 64, 96), (3, 3, 64, 64)
    assert seen == list(zip([False, False, True], shapes, [False, True, False], strict=True))


def test_missing_packages_are_reported_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    assert main(["export", "shvit_s1", "--out", str(tmp_path / "x.onnx")]) == 2
    said = capsys.readouterr()
    assert "onnx and onnxscript and onnxruntime missing: pip install onnx" in said.err
    assert not said.out


@pytest.mark.slow
def test_onnx_by_the_command_in_int8(tmp_path, capsys):
    folder, path = make_photos(tmp_path / "photos", 8), tmp_path / "van.onnx"
    words = ["export", "van_b0", "--size", "64", "--dynamic", "--int8", "--out", str(path)]
    assert main([*words, "--calibration", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "int8 agrees with float in" in out
    assert "  3×3×32×32        int8, noise: " in out
    assert "  2×3×91×77        int8, noise: " in out
    assert out.endswith("before quantisation\n")
    file = onnx.load(path)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in file.graph.node}
    axes = [d.dim_param or d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    facts = {entry.key: entry.value for entry in file.metadata_props}
    assert facts["model"] == "van_b0"
    assert json.loads(facts["preprocessing"])["mean"] == [0.5, 0.5, 0.5]
    assert path.stat().st_size < 6e6
    require_writable({"--out": (path, ONNX)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "van.onnx"]


class Wrong(torch.nn.Module):
    """Gives the mean of the first pixels, as many as were there while it was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.in_chans = 3
        self.pretrained_cfg = {}

    def forward(self, x: Tensor) -> Tensor:
        bound = int(x.shape[2])  # what makes a graph of one size
        return x[:, :, :bound].mean((2, 3)) * self.scale


class Branching(Wrong):
    """Asks what is in the image, which no graph can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "differs", "said"),
    [
        (Wrong, False, "wrong: "),
        (Wrong, True, "differs from the model by .* it was not written"),
        (Branching, False, "wrong: cannot be exported: "),
    ],
    ids=["static", "differing", "untraceable"],
)
def test_graphs_that_are_not_written(model, differs, said, tmp_path, monkeypatch):
    loaded, path = Loaded(model().eval(), "wrong"), tmp_path / "wrong.pt2"
    path.write_text("as it was")
    if differs:
        scaled = lambda path: lambda x: loaded.model(x) * 1.001  # noqa: E731
        monkeypatch.setattr(graphs, "program_runner", scaled)
    with pytest.raises(CommandError, match=said) as raised:
        shapes = graphs.check_shapes((1, 3, 64, 64), not differs and model is Wrong)
        export(loaded, path, "pt2", shapes)
    assert "\n" not in str(raised.value)
    assert path.read_text() == "as it was" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_errors_of_check():
    model, shapes = small("shvit").eval().requires_grad_(False), [(1, 3, 64, 64)]
    for run, error in (
        (lambda x: model(x) * float("nan"), float("inf")),
        (model, 0),
        (lambda x: model(x) * 1.001, pytest.approx(1e-3, rel=0.01)),
    ):
        assert errors(model, run, shapes) == [error]
    with pytest.raises(CommandError, match=r"at \(1, 3, 64, 64\) the model's output is not finite"):
        errors(lambda x: model(x) / 0, model, shapes)
    with pytest.raises(CommandError, match=r"the file returns \(1, 10\)"):
        errors(model, lambda x: model(x)[:, :10], shapes)
    (found,) = graphs.check(model, lambda x: model(x) * 1.001, shapes)
    assert found.allowed == graphs.TOLERANCE < found.error
    for parameter in model.parameters():
        parameter.zero_()
    assert errors(model, model, shapes) == [0]
    assert errors(model, lambda x: model(x) + 1e-9, shapes) == [float("inf")]


class Magnifying(torch.nn.Module):
    """The difference of two sums of the same numbers: nothing but rounding, and a little more."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.cumsum(3)[..., -1] - x.sum(3)).mean((1, 2), dtype=x.dtype)[:, None] + 1e-6


def test_float32_rounding_is_tolerated():
    model = Magnifying()
    shape = (1, 3, 64, 640)
    (found,) = graphs.check(model, lambda x: model(x.flip(3)), [shape])
    assert graphs.TOLERANCE < found.error <= found.allowed
    (found,) = graphs.check(model, lambda x: model(x) + 1, [shape])
    assert found.error > found.allowed


def test_agreement_of_predictions_and_noise():
    model = torch.nn.Flatten()
    pictures = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    told, decibels = agreement(model, lambda x: x, pictures)
    assert "in 100.0 % of 2 predictions" in told and decibels == float("inf")
    told, decibels = agreement(model, lambda x: torch.tensor([[1.0, 0.0]]), pictures)
    assert "in 50.0 % of 2 predictions" in told and decibels == pytest.approx(0, abs=1e-9)
    for run, said in (
        (lambda x: x * float("nan"), "at .1, 2. the int8 file's output is not finite"),
        (lambda x: x[:, :1], "the file returns"),
    ):
        with pytest.raises(CommandError, match=said):
            agreement(model, run, pictures)


def test_calibration_images(tmp_path):
    loaded = Loaded(small("shvit"), "shvit")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(CommandError, match="no readable images in .*; give a folder of"):
        calibration_images(loaded, tmp_path, 3, (32, 48))
    for number in range(9):  # of which every third is taken, and the first cannot be read
        Image.new("L", (50, 40), 20 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "broken.png").unlink()
    images = calibration_images(loaded, tmp_path, 3, (32, 48))
    assert [image.shape for image in images] == [(1, 3, 32, 48)] * 2
    grey = [(image * 0.225 + 0.406)[0, 2, 0, 0].item() * 255 for image in images]
    assert grey == pytest.approx([60, 120], abs=0.01)


class Deformed(torch.nn.Module):
    """A deformable convolution whose offsets come from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torchvision.ops.DeformConv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, x.mean(1, keepdim=True).expand(-1, 18, -1, -1))


def test_deformable_convolutions_are_decomposed(tmp_path):
    """OpenVINO, for one, has no DeformConv."""
    model, path = Deformed().eval(), tmp_path / "m.onnx"
    graphs.save_onnx(graphs.trace(model, (1, 3, 8, 12), dynamic=False), path)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "GridSample" in operators and "DeformConv" not in operators
    assert max(errors(model, graphs.onnx_runner(path), [(1, 3, 8, 12)])) < 1e-5
    require_writable({"--out": (path, ONNX)})  # an earlier result


@pytest.mark.parametrize(
    ("stride", "pad", "dilation"), [((2, 2), (0, 0), (1, 1)), ((1, 2), (2, 1), (2, 3))]
)
def test_sampled_deformable_convolution(stride, pad, dilation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 13, 9), torch.randn(7, 5, 2, 3), torch.randn(7)
    shape = torch.nn.functional.conv2d(x, weight, None, stride, pad, dilation).shape[2:]
    offset = 3 * torch.randn(2, 12, *shape)
    expected = torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, pad, dilation)
    sampled = graphs.sampled_deform_conv2d(
        x, weight, offset, x, bias, *stride, *pad, *dilation, 1, 1, False
    )
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)


# -- HAT: thousands of nodes, whose equal tables are stored once

TINY_HAT: dict[str, Any] = {"dim": 24, "window_size": 4, "compress_ratio": 3, "squeeze_factor": 8}


def tiny_hat(groups: int, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"depths": (2,) * groups, "num_heads": (2,) * groups, **TINY_HAT, **kwargs}
    return backbones.create_model("hat_s_x2", **arguments).eval()


def test_equal_tables_are_stored_once(tmp_path: Path) -> None:
    """Every block of a group has the same positions, of 16 × 16 and 16 × 36 places."""
    model, path = tiny_hat(1), tmp_path / "m.onnx"
    graphs.save_onnx(graphs.trace(model, (1, 3, 4, 8), dynamic=False), path)
    (found,) = graphs.check(model, graphs.onnx_runner(path), [(1, 3, 4, 8)])
    assert found.error < 1e-5
    constants = [t.raw_data for t in onnx.load(path).graph.initializer if len(t.raw_data) > 2000]
    assert constants and len(set(constants)) == len(constants)


@pytest.mark.slow
def test_dynamic_sizes_down_to_one_pixel(tmp_path):
    model, path = tiny_hat(2), tmp_path / "m.onnx"
    graphs.save_onnx(graphs.trace(model, (1, 3, 16, 16), dynamic=True), path)
    shapes = [(1, 3, 1, 1), (2, 3, 4, 5), (1, 3, 13, 4), (3, 3, 9, 14)]
    for found in graphs.check(model, graphs.onnx_runner(path), shapes):
        assert found.error < 1e-5, found.shape


# -- faults: a line, and no files


class Plain(torch.nn.Module):
    """One convolution, of more bytes than the limit below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 64, 3)
        self.in_chans, self.num_classes = 3, 0
        self.pretrained_cfg = {"input_size": (3, 16, 16)}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_files_larger_than_the_limit(ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    path.write_text("as it was")
    said = f"cannot write {path}: `ulimit -f` or the file"
    with files_that_may_not_grow(2000), pytest.raises(FileError, match=said):
        export(Loaded(Plain().eval(), "plain"), path, ending, [(1, 3, 16, 16)])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "as it was"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_signals_leave_nothing_behind(number, status, tmp_path, monkeypatch, default_signals):
    def half(program: Any, path: Path) -> None:
        path.write_text("half")
        path.with_name(f"{path.name}.data").write_text("half")
        os.kill(os.getpid(), number)
        time.sleep(10)

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(graphs, "trace", lambda *args: None)
    monkeypatch.setattr(graphs, "save_program", half)
    assert main(["export", "shvit_s1", "--size", "64", "--out", str(tmp_path / "x.pt2")]) == status
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == before


# -- int8 in safetensors, and what other commands make of the file ---------------------------------


_REASON = not_faster_in_int8(torch.device("cpu"))
_needs_int8 = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The checkpoint of a run with three classes, of a shallow model."""
    run = tmp_path / "run"
    run.mkdir()
    torch.manual_seed(0)
    model = backbones.create_model("shvit_s1", num_classes=3, depths=(1, 1, 1))
    facts = {"model": "shvit_s1", "classes": '["cat", "dog", "owl"]'}
    save_weights(run / "best.safetensors", model.state_dict(), facts)
    recipe = {"model": "shvit_s1", "num_classes": 3, "img_size": 64, "data": "x", "crop_pct": 1.0}
    recipe["model_args"] = {"depths": [1, 1, 1]}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    return run / "best.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 3)


@_needs_int8
def test_the_file_stands_alone(trained, photos, tmp_path, capsys):
    """It has the recipe, and predicts as the checkpoint does in int8 with these ranges."""
    path = tmp_path / "elsewhere" / "model.safetensors"
    path.parent.mkdir()
    words = ["export", "shvit_s1", "--checkpoint", str(trained), "--size", "64", "--int8"]
    options = ["--calibration", str(photos), "--max-drop", "0.5", "--out", str(path)]
    assert main([*words, *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "layers in int8 (calibrated ranges)" in said[0]
    assert said[1].startswith("  int8 agrees with float in ")
    assert said[2].startswith(f"{path}: shvit_s1 in int8 for any batch and size, ")
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    assert torch.int8 in {tensor.dtype for tensor in load_file(path).values()}

    loaded = load(None, path)
    assert loaded.recipe is not None and loaded.recipe.img_size == 64
    assert loaded.classes == ["cat", "dog", "owl"] and loaded.model.precision.calibrated
    outputs = []
    for dtype in ([], ["--dtype", "int8"]):
        assert main(["predict", str(photos), "--checkpoint", str(path), *dtype]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "owl" in outputs[0]
    assert main(["predict", str(photos), "--checkpoint", str(path), "--cam", "x.png"]) == 2
    assert "--cam needs weights from before fuse()" in capsys.readouterr().err
    words = ["embed", str(photos), "--checkpoint", str(path), "--out", str(tmp_path / "embedded")]
    assert main(words) == 0
    assert main(["verify", "shvit_s1", "--checkpoint", str(path)]) == 0
    assert "outputs of these weights: finite" in capsys.readouterr().out
    words = ["export", "shvit_s1", "--checkpoint", str(path), "--out", str(tmp_path / "x.onnx")]
    assert main(words) == 2
    assert "has int8 weights, which cannot be exported" in capsys.readouterr().err


@_needs_int8
@pytest.mark.parametrize("fault", ["", "loading", "nothing to gain"])
def test_without_images(fault, trained, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.safetensors"
    told = "(a range for each row of inputs)"
    if fault == "loading":
        told = f"error: shvit_s1: {path} has NaN or infinite weights; it was not written"

        def refuse(model: torch.nn.Module, path: Path) -> None:
            raise backbones.CheckpointError(f"{path} has NaN or infinite weights")

        monkeypatch.setattr(backbones, "load_checkpoint", refuse)
    elif fault:
        told = "error: shvit_s1: no layer of SHViT can compute in int8: stages.0"
        for name in ("_FEWEST_IN_INT8", "_FEWEST_IN_INT8_OF_TILES"):
            monkeypatch.setattr(policy, name, 1 << 40)
    words = ["export", "shvit_s1", "--checkpoint", str(trained), "--int8", "--out", str(path)]
    for _ in range(2):  # an earlier result is replaced
        assert main(words) == (2 if fault else 0)
    said = capsys.readouterr()
    assert told in said.out + said.err and path.exists() is not bool(fault)


def test_runs_of_restoration(tmp_path):
    """Their recipe has the model's arguments; preprocessing is the model's own."""
    arguments = {"dim": 24, "depths": [2], "num_heads": [2], "window_size": 8}
    model = backbones.create_model("hat_nano_x2", in_chans=1, **arguments)
    save_weights(tmp_path / "best.safetensors", model.state_dict(), {})
    recipe = {"model": "hat_nano_x2", "task": "sr", "in_chans": 1, "model_args": arguments}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load(None, tmp_path / "best.safetensors")
    assert loaded.name == "hat_nano_x2" and loaded.recipe is None
    assert loaded.model.in_chans == 1 and len(loaded.model.stages) == 1
