"""The page on what every family learns: from the JSON alone, and from a training."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from zoo import CLASSIFIERS

import backbones

# Validation accuracy in %, where it is not 90; chance is 10. The 4×4 tokens of this one are padded
# to its windows of 7×7, so that two thirds of what a token sees are zeros: four epochs are few.
LEAST = {"nat_isotropic_small": 50}
PATH = Path(__file__).parents[2] / "tools" / "learning_page.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("learning_page", PATH)
    module = sys.modules["learning_page"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(family, accuracies):
    keys = {"train_loss": 0.5, "train_top1": 90.0, "val_loss": 0.4}
    return {
        "family": family,
        "parameters": 4_200_000,
        "cpu_seconds": 61.5,
        "updates_per_epoch": 45,
        "history": [{**keys, "val_top1": accuracy} for accuracy in accuracies],
    }


def test_the_smallest_variant_of_every_family_takes_part(tool):
    variants = list(yaml.safe_load(tool.CONFIG.read_text())["variants"])
    families = {m: f for f in backbones.list_families() for m in backbones.list_models(family=f)}
    assert sorted(families[variant] for variant in variants) == CLASSIFIERS


def test_page_and_picture(tool, tmp_path):
    report = {
        "machine": "a machine",
        "recipe": {"img_size": 64},
        "results": {
            "van_b0": result("van", [80.0, 97.25]),
            "shvit_s1": {**result("shvit", [50.0, 90.0]), "machine": "another"},
        },
    }
    (tmp_path / "learning.json").write_text(json.dumps(report))
    tool.main(["--folder", str(tmp_path)])
    text = (tmp_path / "learning.md").read_text()
    assert "Trained with a machine; `shvit_s1` with another.\n" in text
    assert "| van | `van_b0` | 4.2 | 80.0 % | 97.25 | 0.500 | 62 |" in text
    assert "2 epochs of 45 updates" in text.replace("\n", " ")
    with Image.open(tmp_path / "learning.png") as picture:
        assert picture.size[0] > 400


THROUGHPUT = {
    "machine": {"name": "a processor, 2 cores", "threads": 1, "torch": "2.0"},
    "loader": {
        "images": 512,
        "workers": 1,
        "ours_images_per_second": 298.1,
        "timm_images_per_second": 304.2,
        "ratio": 0.98,
        "aim": "ratio >= 0.9",
    },
    "step": {
        "model": "shvit_s1",
        "batch_size": 32,
        "img_size": 64,
        "ours_ms": 172.9,
        "bare_ms": 169.1,
        "ratio": 1.014,
        "aim": "ratio <= 1.05",
    },
}


def test_what_the_training_code_costs(tool):
    text = tool.of_throughput(THROUGHPUT)
    assert "on a processor, 2 cores, 1 thread(s), torch 2.0" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [6] * 4
    assert "| 298 images/s | timm's loader: 304 images/s | 0.980 | ≥ 0.9 |" in table[2]
    assert "32 at 64×64 | 172.9 ms | a bare PyTorch loop: 169.1 ms | 1.014 | ≤ 1.05 |" in table[3]


def test_robustness(tool):
    noises = {"gaussian_noise": 80.0, "shot_noise": 70.0, "impulse_noise": 60.0, "all noise": 70.0}
    seeds = {str(seed): {"clean": 90.0 + seed, **noises} for seed in range(3)}
    report = {"model": "favit_b0", "depths": [1, 1, 2, 1], "machine": "torch 2.0 on a processor"}
    text = tool.of_robustness({**report, "results": {"as published": seeds, "with both": seeds}})
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [7] * 4
    row = "| 91.0 (90.0–92.0) | 80.0 (80.0–80.0) | 70.0 (70.0–70.0) | 60.0 (60.0–60.0) |"
    assert table[2].startswith(f"| as published {row}")
    assert "with depths 1, 1, 2, 1 on the digits above at 32×32" in text


def test_the_committed_page_is_that_of_the_committed_figures(tool):
    report = json.loads((tool.DOCS / "learning.json").read_text())
    throughput = json.loads((tool.DOCS / "performance" / "training.json").read_text())
    path = tool.DOCS / "robustness.json"  # of a measurement of its own, if it was made
    robustness = json.loads(path.read_text()) if path.exists() else None
    assert (tool.DOCS / "learning.md").read_text() == tool.page(report, throughput, robustness)
    variants = yaml.safe_load(tool.CONFIG.read_text())
    assert list(report["results"]) == list(variants.pop("variants"))
    assert report["recipe"] == variants
    for model, result in report["results"].items():
        assert max(row["val_top1"] for row in result["history"]) > LEAST.get(model, 90), model
    assert throughput["loader"]["met"] and throughput["step"]["met"]


def test_results_of_another_recipe_do_not_stay(tool, tmp_path, monkeypatch):
    old = {"recipe": {"img_size": 1}, "results": {"van_b0": result("van", [1.0])}}
    (tmp_path / "learning.json").write_text(json.dumps(old))
    trained = []

    def train(model):
        trained.append(model)
        return result(model.split("_")[0], [90.0, 95.0])

    monkeypatch.setattr(tool, "train", train)
    # One picture for each result takes longer than all the rest.
    monkeypatch.setattr(tool, "draw", lambda report, path: path.touch())
    tool.main(["--folder", str(tmp_path), "--train", "shvit_s1", "van_b0"])
    report = json.loads((tmp_path / "learning.json").read_text())
    assert trained == list(report["results"]) == ["shvit_s1", "van_b0"]
    tool.main(["--folder", str(tmp_path), "--train"])
    assert len(trained) == len(set(trained)) == len(CLASSIFIERS)


def test_without_results_there_is_no_page(tool, tmp_path):
    with pytest.raises(SystemExit, match="add --train"):
        tool.main(["--folder", str(tmp_path)])


@pytest.mark.slow
def test_a_training(tool):
    result = tool.train("shvit_s1")
    assert result["family"] == "shvit" and len(result["history"]) == 4
    assert result["history"][-1]["val_top1"] > 95
