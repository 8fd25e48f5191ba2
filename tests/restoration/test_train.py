"""``tools/sr.py train`` learns, and resumes bit for bit, also with two processes."""

from __future__ import annotations

import csv
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from gradient_law import FORMATS, Case, alone, assert_same, gradients
from PIL import Image
from restoration_runs import TINY, make_pictures, start, start_two, train
from torch import nn
from training_runs import final_state, kill, kill_at_call, same
from zoo import images, randomise, small

import backbones
from backbones.common.errors import RecipeError
from backbones.hat import HAT
from backbones.restoration.recipe import RestorationRecipe
from backbones.restoration.train import RestorationTrainer, build_restorer
from backbones.training.command_line import load_recipe
from backbones.training.run_state import load_state

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


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert train(*pictures, f"--output={output}", "--name=run", *RECIPE) == 0
    return final_state(output / "run")


def test_output_files(pictures, tmp_path, capsys):
    arguments = (*pictures, f"--output={tmp_path}", "--name=run", "--epochs=2", "--ema-decay=0.5")
    assert train(*arguments, "--updates-per-epoch=15", "--lr=5e-3", pictures=True) == 0
    folder, printed = tmp_path / "run", capsys.readouterr().out
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
def test_a_killed_run_resumes_bit_for_bit(name, number, pictures, undisturbed, tmp_path):
    arguments = (*pictures, f"--output={tmp_path}", "--name=run", *RECIPE)
    process = start(*arguments, before=partial(kill_at_call, name, number))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert train(*arguments, "--resume=auto") == 0
    assert same(final_state(tmp_path / "run"), undisturbed)


@pytest.mark.slow
def test_loader_processes_change_nothing(pictures, undisturbed, tmp_path):
    process = start(*pictures, f"--output={tmp_path}", "--name=run", *RECIPE, "--workers=2")
    process.join()
    assert process.exitcode == 0
    assert same(final_state(tmp_path / "run"), undisturbed)


def test_two_processes_equal_one_with_the_double_batch(pictures, tmp_path):
    plain = ["--opt=momentum", "--momentum=0", "--sched=none", "--epochs=2", "--lr=0.1", "--no-ema"]
    arguments = (*pictures, f"--output={tmp_path}", *plain)
    processes = start_two(*arguments, "--name=two")
    assert train(*arguments, "--name=one", "--batch-size=4") == 0
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (final_state(tmp_path / name) for name in ("one", "two"))
    assert one["updates"] == two["updates"] == 8
    for key, value in two["model"].items():
        torch.testing.assert_close(value, one["model"][key], rtol=1e-4, atol=1e-6)
    for row, other in zip(two["history"], one["history"], strict=True):
        for key in ("train_loss", "val_psnr_y", "val_ssim_y"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_gradient_of_a_patch_alone_is_that_within_a_batch(memory_format):
    case = Case("hat", "train", memory_format)
    model = randomise(small("hat", drop_path_rate=0.0)).train()
    model.to(memory_format=FORMATS[memory_format])
    truth = images(2, 3, 32, 48, seed=1)

    def objective(x):
        # The loss is a mean over patches; the images tell which of the truths is theirs.
        chosen = truth[: len(x)] if torch.equal(x[0], spoilt[0]) else truth[1:]
        loss, count = RestorationTrainer.compute(SimpleNamespace(net=model), (x, chosen))
        return loss * count

    spoilt = images(2, 3, 16, 24).contiguous(memory_format=FORMATS[memory_format])
    whole = gradients(objective, spoilt, model)
    assert_same(alone(objective, spoilt, model), whole, case, model)


def test_two_processes_resume_bit_for_bit(pictures, tmp_path):
    arguments = (*pictures, f"--output={tmp_path}", *RECIPE)
    for process in start_two(*arguments, "--name=undisturbed"):
        process.join()
    processes = start_two(*arguments, "--name=run", before=(partial(kill_at_call, "link", 3), None))
    processes[0].join()
    kill(processes[1])
    assert processes[0].exitcode == -signal.SIGKILL
    for process in start_two(*arguments, "--name=run", "--resume=auto"):
        process.join()
        assert process.exitcode == 0
    states = [final_state(tmp_path / name) for name in ("undisturbed", "run")]
    assert len(states[0]["ranks"]) == 2 and same(*states)


@pytest.mark.parametrize("task", ["denoise", "jpeg", "real"])
def test_other_tasks(task, pictures, tmp_path):
    model = "--model-args=" + (TINY if task == "real" else TINY[:-1] + ", upscale: 1}")
    more = ["--epochs=1", "--updates-per-epoch=2", f"--task={task}", model]
    assert train(*pictures, f"--output={tmp_path}", "--name=run", *more) == 0
    row = final_state(tmp_path / "run")["history"][0]
    assert 5 < row["val_psnr_y"] < 60


def test_validation_in_tiles(pictures, tmp_path):
    """Of 20×22 pixels: nine tiles of three pictures for the weights and for their average."""
    arguments = (*pictures, f"--output={tmp_path}", "--epochs=1", "--updates-per-epoch=1")
    counts = []
    for words in ((), ("--val-tile=8",)):
        calls = []

        def count(module, *_, calls=calls):
            calls.append(isinstance(module, HAT) and not module.training)

        with nn.modules.module.register_module_forward_hook(count):
            assert train(*arguments, f"--name={len(words)}", *words) == 0
        counts.append(sum(calls))
    assert counts == [2 * 3, 2 * 3 * 9]


def test_errors_are_reported(pictures, tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert train(*pictures, f"--output={tmp_path}", *arguments) == 2
        return capsys.readouterr().err

    assert "unknown option '--mixup'" in error("--mixup=0.2")
    assert "task denoise keeps the size, but hat_nano_x2 enlarges 2" in error("--task=denoise")
    assert "needs a model whose upscale is 2, 3 or 4" in error("--model-args={upscale: 1}")
    assert "van_b0 does not output images" in error("--model=van_b0", "--model-args={}")
    assert "sigma must be within 0 … 255, not (-1.0,)" in error("--sigma", "-1")
    assert "sigma must be one or more numbers" in error("--sigma=[]")
    assert "quality must be the lowest and the highest" in error("--quality", "40", "10")
    assert "quality must be 2 numbers within 1 … 100" in error("--quality", "40")
    assert "model_args" in error("--model-args={depths: 3}")
    assert "error: device nope cannot be used here: " in error("--device=nope")
    assert "no image at /nowhere" in error("--train-pictures=/nowhere")
    assert "cannot be read, more than max_corrupt" in error("--patch-size=40", "--name=large")
    listed = (tmp_path / "large" / "corrupt_train.txt").read_text()
    assert "smaller than a patch of 80×80" in listed
    assert train(*pictures, f"--output={tmp_path}", "--name=a", "--epochs=1") == 0
    small = make_pictures(tmp_path / "small", 1, side=14)
    assert "0.png is smaller than 16×16 pixels" in error(f"--val-pictures={small}")
    again = ("--name=a", "--resume=auto", "--epochs=2", "--model-args", TINY.replace("8", "16", 1))
    assert "does not fit this recipe" in error(*again)


def test_nan_weights_are_never_saved(pictures, tmp_path, monkeypatch, capsys):
    original = RestorationTrainer.apply_gradients

    def apply_gradients(self):
        original(self)
        if self.updates + 1 == 8:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr(RestorationTrainer, "apply_gradients", apply_gradients)
    arguments = (*pictures, f"--output={tmp_path}", "--name=run", "--epochs=2")
    assert train(*arguments) == 2
    said = capsys.readouterr().err
    assert "the validation after 8 updates found psnr_y nan" in said and said.count("\n") == 1
    assert load_state(tmp_path / "run" / "last.pt")["updates"] == 4
    with safetensors.safe_open(tmp_path / "run" / "best.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "1"


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


def test_quickstart_has_no_original_and_is_small():
    model = backbones.create_model("hat_nano_x2")
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    with pytest.raises(RecipeError, match="no model"):
        build_restorer(RestorationRecipe())


@pytest.mark.slow
def test_the_promised_gain(tmp_path):
    """At least 0.3 dB over bicubic on held-out photographs."""
    from backbones.restoration.train import main

    assert main(["--config", str(CONFIGS / "quickstart.yaml"), f"--output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "quickstart" / "summary.csv").read_text().splitlines()))
    assert max(float(row["ema_psnr_y"] or 0) for row in rows) >= 34.06 + 0.3
