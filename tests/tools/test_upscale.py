"""``vision-backbones upscale`` and ``tools/sr.py validate``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
from backbones.cli.main import main
from backbones.common.errors import DataError
from backbones.restoration import upscale_files, validate
from backbones.restoration.metrics import quality
from backbones.restoration.pictures import read_picture, to_tensor
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
    return main(["upscale", *map(str, words), *model_of(weights)])


def model_of(weights: str | Path) -> list[str]:
    words = ["--model=hat_nano_x2", f"--model-args={ARGS}", f"--checkpoint={weights}"]
    return ["--device=cpu", *words]


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
    more = ("--tile=16", "--overlap=8", "--compare", "--suffix=", "--format=webp")
    for name, words in (("plain", more), ("out", (*more, "--tta"))):
        assert upscale(weights, source, "--out", tmp_path / name, *words) == 0
    plain, ours = (read_picture(tmp_path / name / "a.webp").pixels for name in ("plain", "out"))
    assert not np.array_equal(plain, ours)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.webp", "a_webp_compare.png"]
    ours = torch.from_numpy(ours.copy())
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
    options = [f"--csv={tmp_path / 'a.csv'}", *model_of(tmp_path / "large.pt")]
    assert validate.main([str(tmp_path / "Set"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not finite" in line
    assert not (tmp_path / "a.csv").exists()


def test_running_out_of_memory_fails_one_picture(weights, tmp_path, monkeypatch, capsys):
    """As does a picture that is missing; the rest go on."""
    first, second = make(tmp_path / "a.png"), make(tmp_path / "b.png", size=(300, 200))
    third, out = make(tmp_path / "c.png"), tmp_path / "out"
    gone = tmp_path / "none.png"
    read = upscale_files.read_picture

    def short(path: Path) -> Any:
        if path == first:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: 9 bytes")
        return read(path)

    monkeypatch.setattr(upscale_files, "read_picture", short)
    monkeypatch.setattr("backbones.restoration.upscale.available_memory", lambda device: 2**20)
    assert upscale(weights, first, second, gone, third, "--out", out) == 1
    one, other, last = sorted(capsys.readouterr().err.splitlines())
    assert one.startswith(f"error: {first}: not enough memory") and "there is no file" in last
    assert "b.png: the free memory is not enough for 200×300" in other
    assert [path.name for path in out.iterdir()] == ["c_x2.png"]
    monkeypatch.setattr(upscale_files, "read_picture", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upscale(weights, first, "--out", out)


def test_sizes_of_memory():
    assert parse_size("800M") == 800 * 2**20 and parse_size("64") == 64 * 2**20
    assert parse_size("1.5 GiB") == 1.5 * 2**30


def test_outputs_are_not_inputs(tmp_path):
    make(tmp_path / "a.png")
    make(tmp_path / "out/a_x2.png")
    jobs = upscale_files.plan_jobs([tmp_path], tmp_path / "out", "_x2")
    assert [source for source, _ in jobs] == [tmp_path / "a.png"]
    with pytest.raises(DataError, match="no images in"):
        upscale_files.plan_jobs([tmp_path / "out"], tmp_path / "out", "_x2")


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
    folders = [str(tmp_path / "Set5"), str(tmp_path / "Both")]
    table = tmp_path / "scores.csv"
    assert validate.main([*folders, *model_of(weights), f"--csv={table}"]) == 0
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
    assert upscale(weights, tmp_path / "Both/LRbicx2", "--out", tmp_path / "out") == 0
    pictures = tmp_path / "out/img_0x2_x2.png", tmp_path / "Set5/img_0.png"
    ours, truth = (to_tensor(read_picture(path).pixels, 3) for path in pictures)
    without_border = quality(ours, truth, border=2)["psnr_y"]
    assert float(rows[0]["psnr_y"]) == pytest.approx(without_border, abs=1e-3)


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
    words = [str(tmp_path), *model_of(weights)]
    make(tmp_path / "HR/x.png")
    for low, told in (("y", "no low-resolution image for x.png"), ("x", "is not 2 times smaller")):
        make(tmp_path / f"LR/{low}.png")
        assert validate.main(words) == 2 and told in capsys.readouterr().err
