"""``make train``."""

import csv
import json
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from PIL import Image
from training_runs import MODEL_ARGS, TINY

import backbones
import train_cls
from backbones.cli.main import main
from backbones.data.splits import open_splits
from backbones.training.recipe import Recipe
from backbones.training.record import RESULTS

QUICKSTART = Path(train_cls.__file__).parent / "configs" / "cls" / "quickstart.yaml"


def read_summary(folder):
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


def test_the_digits_are_split_evenly():
    splits = open_splits(Recipe(data="digits"))
    assert (len(splits.train), len(splits.validation)) == (1442, 355)
    for source, share in ((splits.train, 0.8), (splits.validation, 0.2)):
        counts = [int((source.labels == number).sum()) for number in range(10)]
        assert all(abs(count / (179.7 * share) - 1) < 0.06 for count in counts)


def test_it_learns_and_leaves_its_files(tmp_path, capsys):
    arguments = ["--config", str(QUICKSTART), f"--output={tmp_path}", "--epochs=2", "--img-size=32"]
    assert train_cls.main([*arguments, *TINY[1:], "--log-every=2"]) == 0
    folder = tmp_path / "quickstart"
    wanted = {name for name in RESULTS if not name.startswith(("corrupt", "bad", "comparison"))}
    assert wanted <= {path.name for path in folder.iterdir()}
    printed = capsys.readouterr().out
    assert all(name in printed for name in wanted) and str(folder) in printed

    rows = read_summary(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["train_top1"]) > float(rows[0]["train_top1"]) > 10  # per cent: chance
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e["update"] for e in entries if "loss" in e] == list(range(2, 45, 2))
    for name in ("curves.png", "predictions.png"):
        with Image.open(folder / name) as picture:
            assert picture.size[0] > 1000

    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    assert (recipe["num_classes"], recipe["img_size"], recipe["mean"][0]) == (10, 32, 0.485)
    with safetensors.safe_open(folder / "best.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["model"], json.loads(facts["classes"])) == ("shvit_s1", list("0123456789"))
    weights = safetensors.torch.load_file(folder / "best.safetensors")
    for file in ("best.safetensors", "last.pt"):
        model = backbones.create_model(
            "shvit_s1", checkpoint_path=str(folder / file), num_classes=10, **MODEL_ARGS
        )
        assert weights.keys() == model.state_dict().keys()


@pytest.mark.slow
def test_the_promised_accuracy_and_features(tmp_path):
    """Nearest neighbours among the digits that were trained on know those that were not."""
    assert train_cls.main(["--config", str(QUICKSTART), f"--output={tmp_path}"]) == 0
    run = tmp_path / "quickstart"
    assert max(float(row["val_top1"]) for row in read_summary(run)) >= 98.5

    tables = [tmp_path / split for split in ("train", "validation")]
    for table in tables:
        words = ["embed", "digits", "--checkpoint", run / "best.safetensors", "--workers", "1"]
        assert main([*map(str, words), f"--split={table.name}", f"--out={table}"]) == 0
    words = ["probe", tables[0], "--test", tables[1], "--labels", "source"]
    assert main([*map(str, words), f"--json={tmp_path / 'probe.json'}"]) == 0
    report = json.loads((tmp_path / "probe.json").read_text())
    assert (report["train"], report["test"]) == (1442, 355)
    for method in report["methods"].values():
        assert method["accuracy"] >= 0.98
