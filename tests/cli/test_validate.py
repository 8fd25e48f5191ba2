"""Accuracy of trained models, real labels, corruptions, and lists that continue after errors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import MODEL_ARGS, TINY, make_images, train

import backbones
from backbones.cli import validate as validation
from backbones.cli.main import main
from backbones.common.errors import DataError, RecipeError
from backbones.data.sources import FileSource
from backbones.training.accuracy import Predictions, read_real_labels, real_accuracy
from backbones.training.corruptions import (
    ALEXNET_ERROR,
    CORRUPTIONS,
    Corruption,
    mean_corruption_error,
)

PICTURE = Path(__file__).parents[2] / "docs" / "learning.png"


def read_table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and a run that has learnt them."""
    folder = tmp_path_factory.mktemp("validate")
    images = make_images(folder / "images", {"train": 36, "val": 12})
    words = (f"--data={images}", f"--output={folder}", "--name=run", "--epochs=4", *TINY)
    assert train(*words, "--lr=3e-3", "--color-jitter=0", "--val-batch-size=12") == 0
    return folder


@pytest.fixture
def validate(folder, tmp_path, capsys):
    def run(*words, data=True):
        data = [f"--data={folder / 'images'}"] if data else []
        output = tmp_path / "results.csv"
        words = [*data, f"--output={output}", "--workers=0", "--batch-size=5", *words]
        status = main(["validate", *words])
        rows = read_table(output) if output.exists() else []
        return status, rows, capsys.readouterr()

    return run


def test_a_run_gets_the_accuracy_that_its_training_saw(validate, folder):
    status, rows, printed = validate("--run", str(folder / "run"))
    assert status == 0
    history = read_table(folder / "run" / "summary.csv")
    best = max(history, key=lambda row: float(row["val_top1"]))
    for key in ("top1", "loss"):
        assert float(rows[0][key]) == pytest.approx(float(best[f"val_{key}"]), abs=1e-3)
    assert (rows[0]["images"], rows[0]["img_size"], rows[0]["top5"]) == ("12", "32", "100.0")
    assert "12 images" in printed.out


def test_options_win_over_what_the_model_states(validate, folder, monkeypatch):
    fuse, fused = backbones.fuse, []
    monkeypatch.setattr(backbones, "fuse", lambda model: fused.append(model) or fuse(model))
    predict_all = validation.predict_all
    watched = lambda *given: fused.append(given[1:3]) or predict_all(*given)  # noqa: E731
    monkeypatch.setattr(validation, "predict_all", watched)
    words = ["--run", str(folder / "run"), "--img-size=64", "--crop-pct=1", "--fuse", "--amp=bf16"]
    status, rows, _ = validate(*words, "--interpolation=nearest")
    found = [rows[0][key] for key in ("img_size", "crop_pct", "interpolation")]
    assert (status, found) == (0, ["64", "1.0", "nearest"])
    assert len(fused) == 2 and len(fused[1][0]) == 3 and fused[1][1] == "bf16"


def test_a_list_continues_after_an_error(validate, folder, tmp_path):
    for name, classes in (("s", 3), ("five", 5)):
        model = backbones.create_model("shvit_s1", num_classes=classes, **MODEL_ARGS)
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    torch.save({"head.fc.weight": torch.zeros(3, 3)}, tmp_path / "bad.pth")
    lines = [f"shvit_s1 {tmp_path}/{name}.pth" for name in ("bad", "five", "s")]
    listing = tmp_path / "models.txt"
    listing.write_text("\n".join(["# some", "shvit_s9 x.pth", "", *lines, ""]))
    status, rows, printed = validate("--list", str(listing), *TINY[1:], "--img-size=32")
    assert status == 1
    assert [bool(row["error"]) for row in rows] == [True, True, True, False] and rows[3]["top1"]
    assert "unknown model 'shvit_s9'" in rows[0]["error"]
    assert "are not for 3 classes" in rows[2]["error"]
    assert "3 of 4 failed: shvit_s9, shvit_s1, shvit_s1" in printed.err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensor: tensor.view(-1)[:1].fill_(torch.nan), "NaN or infinite"),
        (lambda tensor: tensor.copy_(torch.full(tensor.shape, 3e38)), "is not finite"),
    ],
)
def test_non_finite_weights_and_outputs(spoil, said, validate, folder, tmp_path):
    tensors = load_file(folder / "run" / "best.safetensors")
    names = [n for n, t in tensors.items() if n.startswith("head.") and t.is_floating_point()]
    for name in names:
        spoil(tensors[name])
    save_file(tensors, tmp_path / "bad.safetensors")
    (tmp_path / "list.txt").write_text(f"shvit_s1 {tmp_path / 'bad.safetensors'}\n")
    words = [f"--list={tmp_path / 'list.txt'}", "--img-size=32", *TINY[1:]]
    status, rows, printed = validate(*words)
    assert status == 1
    assert said in rows[0]["error"]
    assert said != "NaN or infinite" or names[0] in rows[0]["error"]
    assert "top1" not in rows[0]
    assert "nan" not in (tmp_path / "results.csv").read_text().replace(str(tmp_path), "")
    first, last = printed.err.splitlines()
    assert first.startswith("error: shvit_s1: ")
    assert last == "1 of 1 failed: shvit_s1"


def test_the_report_by_class(validate, folder, tmp_path):
    status, rows, _ = validate("--run", str(folder / "run"), f"--report={tmp_path / 'report'}")
    assert status == 0
    classes = read_table(tmp_path / "report" / "shvit_s1.classes.csv")
    assert [row["class"] for row in classes] == ["class0", "class1", "class2"]
    right = sum(float(row["recall"]) / 100 * int(row["images"]) for row in classes)
    assert 100 * right / 12 == pytest.approx(float(rows[0]["top1"]), abs=0.05)
    with Image.open(tmp_path / "report" / "shvit_s1.confusion.png") as picture:
        assert min(picture.size) > 500


def test_real_labels_by_hand(tmp_path):
    """Images 3, 1, 2, 4; image 2 has no real label and is left out."""
    names = [(f"val/n01/ILSVRC2012_val_{number:08d}.JPEG", 0, 0) for number in (3, 1, 2, 4)]
    source = FileSource(Path("val"), names, np.zeros(4, dtype=np.int64))
    first = np.array([7, 5, 9, 0])[:, None]
    answers = Predictions(first, np.zeros(4), np.arange(4), 0.0, 1.0)
    real = [[1, 5], [], [7], [2]]
    assert real_accuracy(answers, source, real) == pytest.approx(100 * 2 / 3)
    source.files[1] = ("val/n01/cat.png", 0, 0)
    with pytest.raises(DataError, match=r"got val/n01/cat\.png"):
        real_accuracy(answers, source, real)
    (tmp_path / "real.json").write_text("{}")
    with pytest.raises(DataError, match="must be a list"):
        read_real_labels(str(tmp_path / "real.json"))
    assert len(read_real_labels("")) == 50000  # timm's


def test_real_labels_of_a_whole_set(validate, folder, tmp_path):
    places = sorted((folder / "images" / "val").rglob("*.png"))
    real = [[] for _ in range(50000)]
    for number, path in enumerate(places, 1):
        target = tmp_path / "real" / "val" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        (target / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(path.read_bytes())
        real[number - 1] = [0, 1, 2]
    (tmp_path / "real.json").write_text(json.dumps(real))
    words = [f"--data={tmp_path / 'real'}", f"--real-labels={tmp_path / 'real.json'}"]
    status, rows, _ = validate("--run", str(folder / "run"), *words, data=False)
    assert status == 0 and rows[0]["real_top1"] == "100.0"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_increase_with_severity(name):
    generator = np.random.default_rng(0)
    smooth = generator.integers(60, 190, (8, 8, 3), dtype=np.uint8)
    side = 32 if name == "glass_blur" else 64  # that loops over pixels in Python
    image = Image.fromarray(smooth).resize((side, side), Image.Resampling.BICUBIC)
    before = np.random.get_state()[1].copy()
    spoilt = [Corruption(name, severity)(image) for severity in (1, 5)]
    assert np.array_equal(np.random.get_state()[1], before)
    far = [np.abs(np.asarray(s, dtype=float) - np.asarray(image)).mean() for s in spoilt]
    assert {(s.size, s.mode) for s in spoilt} == {((side, side), "RGB")}
    # Frost blends with pieces of photographs, some of them darker than others.
    assert 0 < far[0] < far[1] or (name == "frost" and min(far) > 10)
    if name not in ("impulse_noise", "glass_blur"):
        assert np.array_equal(spoilt[1], Corruption(name, 5)(image))


def test_mean_corruption_error_by_hand():
    errors = {"fog": [40.0, 60.0], "snow": [10.0, 30.0]}
    assert mean_corruption_error(errors) == 35.0
    assert mean_corruption_error(errors, {"fog": 100.0, "snow": 40.0}) == 50.0
    assert mean_corruption_error({n: [e] for n, e in ALEXNET_ERROR.items()}, ALEXNET_ERROR) == 100.0
    with pytest.raises(RecipeError, match="of at least 32×32 pixels"):
        Corruption("fog", 1)(Image.new("RGB", (16, 40)))


def test_a_table_of_corruptions(validate, folder, tmp_path):
    words = ["--run", str(folder / "run"), "--severity", "1", "5", "--corrupt"]
    status, rows, _ = validate(*words, "contrast", "brightness")
    table = read_table(tmp_path / "results.corruptions.csv")
    assert status == 0
    wanted = [(name, severity) for name in ("contrast", "brightness") for severity in "15"]
    assert [(row["corruption"], row["severity"]) for row in table] == wanted
    mean = sum(float(row["error"]) for row in table) / 4
    assert float(rows[0]["corruption_error"]) == pytest.approx(mean, abs=1e-3)
    assert "mce" not in rows[0]  # AlexNet's errors are of ImageNet


def test_the_mce_is_relative_to_alexnet(validate, tmp_path, monkeypatch):
    """Of a model that is always wrong, on a thousand classes."""
    wrong = Predictions(np.zeros((1, 5)), np.ones(1), np.zeros(1), 1.0, 1.0)
    monkeypatch.setattr(validation.Validator, "predict", lambda *given: wrong)
    (tmp_path / "classes.txt").write_text("".join(f"class{n}\n" for n in range(1000)))
    model = backbones.create_model("shvit_s1", **MODEL_ARGS)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    words = [*TINY, f"--checkpoint={tmp_path}/a.pth", f"--class-map={tmp_path}/classes.txt"]
    _, rows, _ = validate(*words, "--corrupt")
    mean = np.mean([100 * 100 / error for error in ALEXNET_ERROR.values()])
    assert float(rows[0]["mce"]) == pytest.approx(mean, abs=1e-3)
