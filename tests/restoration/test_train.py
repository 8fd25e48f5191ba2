"""``tools/sr.py train`` learns, and resumes bit for bit, also with two processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from PIL import Image
from restoration_runs import TINY, make_pictures, start, train
from torch import nn
from training_runs import Runs, final_state, join, same

import backbones
from backbones.common.errors import RecipeError
from backbones.hat import HAT
from backbones.restoration.recipe import RestorationRecipe
from backbones.restoration.train import build_restorer
from backbones.training.command_line import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs" / "sr"
# Everything random is on, and the average too.
RECIPE = [
    "--epochs=3",
    "--save-every-steps=1",
    "--log-every=2",
    "--model-args",
    TINY[:-1] + ", drop_path_rate: 0.2}",
    "--ema-decay=0.9",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pictures")
    folders = (make_pictures(root / "train", 5), make_pictures(root / "val", 3))
    return f"--train-pictures={folders[0]}", f"--val-pictures={folders[1]}"


@pytest.fixture
def runs(pictures, tmp_path, capsys):
    return Runs(tmp_path, capsys, *pictures, train=train, start=start)


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert train(*pictures, f"--output={output}", "--name=run", *RECIPE) == 0
    return final_state(output / "run")


def test_output_files(runs, capsys):
    words = ("--epochs=2", "--ema-decay=0.5", "--updates-per-epoch=15", "--lr=5e-3")
    assert train(*runs.words(*words), pictures=True) == 0
    folder, printed = runs.folder, capsys.readouterr().out
    wanted = {"best.safetensors", "last.pt", "summary.csv", "metrics.jsonl", "comparison.png"}
    assert wanted <= {path.name for path in folder.iterdir()}
    assert all(name in printed for name in wanted) and "dB over bicubic" in printed
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"]) < 0.1
    assert 0.5 < float(rows[1]["ema_ssim_y"]) < 1 and 20 < float(rows[1]["val_psnr_y"]) < 60
    with Image.open(folder / "comparison.png") as picture:
        assert picture.size[0] > 4 * 320  # input, bicubic, ours, truth
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    assert recipe["task"] == "sr" and "mixup" not in recipe
    weights = safetensors.torch.load_file(folder / "best.safetensors")
    for file in ("best.safetensors", "last.pt"):
        model = backbones.create_model(
            "hat_nano_x2", checkpoint_path=str(folder / file), **yaml.safe_load(TINY)
        )
        assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "number"), [("link", 4), pytest.param("fsync", 7, marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_bit_for_bit(name, number, undisturbed, runs):
    runs.kill_at(name, number, *RECIPE)
    runs.train(*RECIPE, "--resume=auto")
    assert same(runs.state(), undisturbed)


@pytest.mark.slow
def test_loader_processes_change_nothing(undisturbed, runs):
    assert join([runs.start(*RECIPE, "--workers=2")]) == [0]
    assert same(runs.state(), undisturbed)


def test_two_processes_equal_one_with_the_double_batch(runs):
    words = ["--opt=momentum", "--momentum=0", "--sched=none", "--epochs=2", "--lr=0.1", "--no-ema"]
    processes = runs.start_two(*words)
    runs.train(*words, "--name=one", "--batch-size=4")
    assert join(processes) == [0, 0]
    one, two = runs.state("one"), runs.state()
    assert one["updates"] == two["updates"] == 8
    for key, value in two["model"].items():
        torch.testing.assert_close(value, one["model"][key], rtol=1e-4, atol=1e-6)
    for row, other in zip(two["history"], one["history"], strict=True):
        for key in ("train_loss", "val_psnr_y", "val_ssim_y"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.parametrize("task", ["denoise", "jpeg", "real"])
def test_other_tasks(task, runs):
    model = "--model-args=" + (TINY if task == "real" else TINY[:-1] + ", upscale: 1}")
    runs.train("--epochs=1", "--updates-per-epoch=2", f"--task={task}", model)
    assert 5 < runs.state()["history"][0]["val_psnr_y"] < 60


def test_validation_in_tiles(runs):
    """Of 20×22 pixels: nine tiles of three pictures for the weights and for their average."""
    counts = []
    for words in (("--name=whole",), ("--val-tile=8",)):
        calls = []

        def count(module, *_, calls=calls):
            calls.append(isinstance(module, HAT) and not module.training)

        with nn.modules.module.register_module_forward_hook(count):
            runs.train("--epochs=1", "--updates-per-epoch=1", *words)
        counts.append(sum(calls))
    assert counts == [2 * 3, 2 * 3 * 9]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixup=0.2"], "unknown option '--mixup'"),
        (["--task=denoise"], "task denoise keeps the size, but hat_nano_x2 enlarges 2"),
        (["--model-args={upscale: 1}"], "needs a model whose upscale is 2, 3 or 4"),
        (["--model=van_b0", "--model-args={}"], "van_b0 does not output images"),
        (["--sigma", "-1"], "sigma must be within 0 … 255, not (-1.0,)"),
        (["--sigma=[]"], "sigma must be one or more numbers"),
        (["--quality", "40", "10"], "quality must be the lowest and the highest"),
        (["--quality", "40"], "quality must be 2 numbers within 1 … 100"),
        (["--model-args={depths: 3}"], "model_args"),
        (["--device=nope"], "error: device nope cannot be used here: "),
        (["--train-pictures=/nowhere"], "no image at /nowhere"),
    ],
)
def test_errors_are_reported(words, message, runs):
    assert message in runs.refuse(*words)


def test_unsuitable_pictures_and_checkpoints(runs):
    assert "cannot be read, more than max_corrupt" in runs.refuse("--patch-size=40", "--name=large")
    listed = (runs.output / "large" / "corrupt_train.txt").read_text()
    assert "smaller than a patch of 80×80" in listed
    small = make_pictures(runs.output / "small", 1, side=14)
    assert "0.png is smaller than 16×16 pixels" in runs.refuse(f"--val-pictures={small}")
    runs.train("--epochs=1")
    again = ("--resume=auto", "--epochs=2", "--model-args", TINY.replace("8", "16", 1))
    assert "does not fit this recipe" in runs.refuse(*again)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_configs(path):
    """Every one can be read, and its model does its task."""
    variants = yaml.safe_load(path.read_text()).get("variants")
    for variant in variants or [None]:
        overrides = {} if variant is None else {"model": variant}
        recipe = load_recipe(path, overrides, RestorationRecipe)
        recipe.checkpoint = None
        # As deep as published they take seconds.
        recipe.model_args = {**recipe.model_args, "depths": (1,), "num_heads": (1,)}
        with torch.device("meta"):
            build_restorer(recipe)


def test_quickstart_has_a_folder_of_its_own():
    """The classifiers' quickstart, of the same name, writes into the default one."""
    recipe = load_recipe(CONFIGS / "quickstart.yaml", {}, RestorationRecipe)
    assert recipe.output != load_recipe(CONFIGS.parent / "cls" / "quickstart.yaml", {}).output
    with pytest.raises(RecipeError, match="no model"):
        build_restorer(RestorationRecipe())


@pytest.mark.slow
def test_the_promised_gain(tmp_path):
    """At least 0.3 dB over bicubic on held-out photographs."""
    from backbones.restoration.train import main

    assert main(["--config", str(CONFIGS / "quickstart.yaml"), f"--output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "quickstart" / "summary.csv").read_text().splitlines()))
    assert max(float(row["ema_psnr_y"] or 0) for row in rows) >= 34.06 + 0.3
