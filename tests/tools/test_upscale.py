"""``vision-backbones upscale`` and ``tools/sr.py validate``."""

from __future__ import annotations

import csv
import io
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
from backbones.cli.main import main
from backbones.common.errors import DataError
from backbones.common.progress import Progress
from backbones.restoration import upscale_files, validate
from backbones.restoration.metrics import quality
from backbones.restoration.pictures import read_picture
from backbones.restoration.resize import resize_bicubic
from backbones.restoration.restorer import parse_size

ROOT = Path(__file__).parents[2]
ARGS = "{dim: 8, depths: [1], num_heads: [2], compress_ratio: 2, squeeze_factor: 4, head_width: 8}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that enlarges bicubically, and a bit more."""
    torch.manual_seed(0)
    keywords: dict[str, Any] = {"dim": 8, "depths": (1,), "num_heads": (2,), "compress_ratio": 2}
    model = backbones.create_model("hat_nano_x2", squeeze_factor=4, head_width=8, **keywords)
    torch.nn.init.normal_(model.head.conv_out.weight, std=0.01)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def make(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 14)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)
    (image.quantize(8) if mode == "P" else image.convert(mode)).save(path)
    return path


def upscale(weights: str, *words: str | Path) -> int:
    options = ["--model=hat_nano_x2", f"--model-args={ARGS}", f"--checkpoint={weights}"]
    return main(["upscale", "--device=cpu", *map(str, words), *options])


def test_folders_globs_and_a_corrupt_picture(weights, tmp_path, capsys):
    make(tmp_path / "in/a.png")
    make(tmp_path / "in/deep/b.jpg")
    make(tmp_path / "in/deep/p.png", "P")
    make(tmp_path / "more/g.tif", "L")
    (tmp_path / "in/notes.txt").write_text("no picture")
    (tmp_path / "in/folder.png").mkdir()
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:150])
    out = tmp_path / "out"
    words = (tmp_path / "in", f"{tmp_path}/more/*.tif", "--out", out)
    assert upscale(weights, *words) == 1
    printed = capsys.readouterr()
    assert "cut.png" in printed.err and "a.png" not in printed.err
    assert "4 of 5 images" in printed.out and "1 failed" in printed.out
    assert "20×14 → 40×28" in printed.out
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert written == ["a_x2.png", "deep/b_x2.jpg", "deep/p_x2.png", "g_x2.tif"]
    for path in written:
        picture = read_picture(out / path)
        assert picture.pixels.shape[:2] == (28, 40) and picture.is_grey == path.endswith(".tif")
    (tmp_path / "in/cut.png").unlink()
    assert upscale(weights, *words) == 0
    assert "4 of 4 images" in capsys.readouterr().out
    assert upscale(weights, *words, "--skip-existing") == 0
    assert "0 of 4 images" in capsys.readouterr().out


def test_the_picture_is_right(weights, tmp_path):
    source = make(tmp_path / "a.png", size=(40, 30))
    more = ("--tile=16", "--overlap=8", "--tta", "--compare", "--suffix=", "--format=webp")
    assert upscale(weights, source, "--out", tmp_path / "out", *more) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.webp", "a_webp_compare.png"]
    ours = torch.from_numpy(read_picture(tmp_path / "out/a.webp").pixels.copy())
    x = torch.from_numpy(read_picture(source).pixels.copy()).permute(2, 0, 1) / 255
    figures = quality(ours.permute(2, 0, 1) / 255, resize_bicubic(x, 2.0), border=4)
    assert figures["psnr_y"] > 30
    with Image.open(tmp_path / "out/a_webp_compare.png") as picture:
        assert picture.size[0] > 2 * 320


def test_quality(weights, tmp_path):
    source, sizes = make(tmp_path / "a.jpg", size=(40, 30)), []
    for percent in (10, 95):
        out = tmp_path / str(percent)
        assert upscale(weights, source, "--out", out, f"--quality={percent}") == 0
        sizes.append((out / "a_x2.jpg").stat().st_size)
    assert 2 * sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{0}/*.gif"], "nothing matches"),
        (["{0}/a.png", "{0}/b/a.png"], "would both become"),
        (["{0}/a.png", "--out={0}", "--suffix="], "would overwrite"),
        (["{0}/a.png", "{0}/a_x2.png", "--out={0}"], "would overwrite {0}/a_x2.png"),
        (["{0}/a.png", "{0}/a_x2_compare.png", "--out={0}", "--compare"], "would overwrite"),
        (["{0}/a.png", "--out={0}/a.png"], "a.png is not a folder"),
        (["{0}/a.png", "--out={0}/a.png/deeper"], "a.png is not a folder"),
        (["{0}/a.png", "--suffix=../x"], "--suffix must be part of a file's name, not "),
        (["{0}/a.png", "--tile=12"], "multiple of the model's window of 8, got 12"),
        (["{0}/a.png", "--model=hat_x4"], "HAT_SRx4_ImageNet-pretrain.pth in http"),
        (["{0}/a.png", "--model=hat_x4", "--checkpoint=/none"], "there is no checkpoint /none"),
        (["{0}/a.png", "--model=van_b0"], "van_b0 does not output images: use one of list_models("),
        (["{0}/a.png", "{w}", "--model-args=[1, 2]"], "--model-args must be such as"),
        (["{0}/a.png", "{w}", "--model-args={{dim: -5}}"], "dim must be in 1"),
        (["{0}/a.png", "{w}", "--model-args={{in_chans: 2}}"], "of 1 or 3 channels"),
    ],
)
def test_impossible_requests_fail_early(words, told, weights, tmp_path, monkeypatch, capsys):
    """Before anything is downloaded or enlarged."""
    for name in ("a", "b/a", "a_x2", "a_x2_compare"):
        make(tmp_path / f"{name}.png")
    two = backbones.create_model("hat_nano_x2", in_chans=2)
    torch.save(two.state_dict(), tmp_path / "two.pt")
    fail = lambda *args, **kwargs: pytest.fail("it ran")  # noqa: E731
    monkeypatch.setattr(upscale_files, "upscale_files", fail)
    monkeypatch.setattr("backbones.common.download.urlopen", fail)
    two_channels = f"--checkpoint={tmp_path / 'two.pt'}"
    words = [word.format(tmp_path, w=two_channels) for word in words]
    words = words if "--out" in " ".join(words) else [*words, f"--out={tmp_path / 'out'}"]
    own = any("--model" in word for word in words)
    model = [] if "--model=" in " ".join(words) else ["--model=hat_nano_x2"]
    options = model if own else [*model, f"--model-args={ARGS}", f"--checkpoint={weights}"]
    assert main(["upscale", "--device=cpu", *words, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told.format(tmp_path) in line


def test_a_missing_picture_is_one_picture(weights, tmp_path, capsys):
    """The rest go on."""
    source = make(tmp_path / "a.png")
    assert upscale(weights, source, tmp_path / "none.png", "--out", tmp_path / "out") == 1
    assert "there is no file" in capsys.readouterr().err


def test_non_finite_results(weights, tmp_path, capsys):
    """Of finite weights: products of large ones overflow."""
    tensors = torch.load(weights, weights_only=True)["model"]
    for tensor in tensors.values():
        if tensor.ndim == 4:
            tensor.copy_(torch.full(tensor.shape, 1e30))
    torch.save(tensors, tmp_path / "large.pt")
    out = tmp_path / "out"
    assert upscale(str(tmp_path / "large.pt"), make(tmp_path / "a.png"), "--out", out) == 1
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'a.png'}: the model's output for it is not finite\n" == said
    assert not out.exists()
    make(tmp_path / "Set/a.png", size=(40, 32))
    options = ["--model=hat_nano_x2", f"--model-args={ARGS}", f"--csv={tmp_path / 'a.csv'}"]
    options += [f"--checkpoint={tmp_path / 'large.pt'}", "--device=cpu"]
    assert validate.main([str(tmp_path / "Set"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not finite" in line
    assert not (tmp_path / "a.csv").exists()


def test_running_out_of_memory_fails_one_picture(weights, tmp_path, monkeypatch, capsys):
    first, second = make(tmp_path / "a.png"), make(tmp_path / "b.png", size=(300, 200))
    third, out = make(tmp_path / "c.png"), tmp_path / "out"
    read = upscale_files.read_picture

    def short(path: Path) -> Any:
        if path == first:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: 9 bytes")
        return read(path)

    monkeypatch.setattr(upscale_files, "read_picture", short)
    monkeypatch.setattr("backbones.restoration.upscale.available_memory", lambda device: 2**20)
    assert upscale(weights, first, second, third, "--out", out) == 1
    one, other = sorted(capsys.readouterr().err.splitlines())
    assert one.startswith(f"error: {first}: not enough memory")
    assert (
        "b.png: the free memory is not enough for 200×300" in other and "MiB are missing" in other
    )
    assert [path.name for path in out.iterdir()] == ["c_x2.png"]
    monkeypatch.setattr(upscale_files, "read_picture", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upscale(weights, first, "--out", out)
    assert parse_size("800M") == 800 * 2**20 and parse_size("64") == 64 * 2**20
    assert parse_size("1.5 GiB") == 1.5 * 2**30


def test_outputs_are_not_inputs(tmp_path):
    make(tmp_path / "a.png")
    make(tmp_path / "out/a_x2.png")
    jobs = upscale_files.plan_jobs([tmp_path], tmp_path / "out", "_x2")
    assert [job.source for job in jobs] == [tmp_path / "a.png"]
    with pytest.raises(DataError, match="no images in"):
        upscale_files.plan_jobs([tmp_path / "out"], tmp_path / "out", "_x2")


def test_progress_has_the_time_left(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    model = backbones.create_model("hat_nano_x2", depths=(1,), num_heads=(2,))
    upscaler = upscale_files.Upscaler(model, tile=8, overlap=8)
    jobs = [upscale_files.Job(make(tmp_path / "a.png"), tmp_path / "out/a.png")]
    progress = Progress(stream=stream)
    progress.pause = 0.0
    assert upscale_files.upscale_files(upscaler, jobs, progress=progress).written == [
        jobs[0].target
    ]
    text = stream.getvalue()
    assert "3/6" in text and "a.png (1/1)" in text and "left" in text


@pytest.mark.parametrize("command", ["train", "validate", ""])
def test_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sr.py", *filter(None, [command]), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tools" / "sr.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert ("--model" in printed) and ("python tools/sr.py" in printed) == (not command)


# --- validation


def scores(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_validation_creates_missing_low_resolution_pictures(weights, tmp_path, capsys):
    """A folder of true pictures alone, and one with both halves made the same way."""
    for number, size in enumerate([(40, 32), (37, 51)]):
        make(tmp_path / f"Set5/img_{number}.png", size=size)
        truth = Image.open(tmp_path / f"Set5/img_{number}.png")
        for place in ("Both/GTmod2", "Both/LRbicx2"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
        truth.save(tmp_path / f"Both/GTmod2/img_{number}.png")
        x = torch.from_numpy(np.array(truth)).permute(2, 0, 1) / 255
        x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        small = (resize_bicubic(x, 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(small.numpy()).save(tmp_path / f"Both/LRbicx2/img_{number}x2.png")
    options = ["--model=hat_nano_x2", f"--model-args={ARGS}", f"--checkpoint={weights}"]
    folders = [str(tmp_path / "Set5"), str(tmp_path / "Both")]
    table = tmp_path / "scores.csv"
    assert validate.main([*folders, *options, "--device=cpu", f"--csv={table}"]) == 0
    printed = capsys.readouterr().out
    assert "Set5" in printed and "2 images" in printed and "bicubic" in printed
    rows = scores(table)
    assert [row["picture"] for row in rows] == ["img_0.png", "img_1.png", "mean"] * 2
    for alone, both in zip(rows[:3], rows[3:], strict=True):
        assert {**alone, "dataset": ""} == {**both, "dataset": ""}
    assert (rows[1]["height"], rows[1]["width"]) == ("50", "36")
    mean = (float(rows[0]["psnr_y"]) + float(rows[1]["psnr_y"])) / 2
    assert float(rows[2]["psnr_y"]) == pytest.approx(mean, abs=1e-3)
    assert 20 < float(rows[2]["bicubic_psnr_y"]) < 60


@pytest.mark.parametrize(
    ("truth", "small"),
    [
        ("HR/0801.png", "LR_bicubic/X2/0801x2.png"),
        ("image_SRF_2/img_001_SRF_2_HR.png", "image_SRF_2/img_001_SRF_2_LR.png"),
        ("GT/baby.png", "X2/baby.png"),
    ],
)
def test_pairs_by_name(truth, small, tmp_path):
    make(tmp_path / truth, size=(40, 40))
    make(tmp_path / small)
    assert validate.find_pairs(tmp_path, 2) == [(tmp_path / truth, tmp_path / small)]


def test_validation_names_mismatched_pairs(weights, tmp_path, capsys):
    options = ["--model=hat_nano_x2", f"--model-args={ARGS}", f"--checkpoint={weights}"]

    def error(folder: str) -> str:
        assert validate.main([str(tmp_path / folder), *options, "--device=cpu"]) == 2
        return capsys.readouterr().err

    assert "there is no folder" in error("none")
    make(tmp_path / "a/HR/x.png")
    make(tmp_path / "a/LR/y.png")
    assert "no low-resolution image for x.png" in error("a")
    make(tmp_path / "a/LR/x.png")
    assert "is not 2 times smaller" in error("a")
