"""Every option of a recipe runs and has its effect."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import timm.optim
import torch
from torch import nn
from training_runs import final_state, make_images, train
from zoo import FAMILIES, outlines, small

import backbones
from backbones.common.errors import RecipeError
from backbones.training import build, optimization
from backbones.training.command_line import load_recipe
from backbones.training.recipe import Recipe

every_family = pytest.mark.parametrize("family", FAMILIES)
FOLDER = Path(__file__).parents[2] / "configs" / "cls"
OPTIONS = {
    "bf16": ["--amp=bf16"],
    "fp16": ["--amp=fp16", "--clip-grad=1"],
    "channels_last": ["--channels-last"],
    "checkpointing": ["--grad-checkpointing"],
    "grey": ["--in-chans=1", "--reprob=0.5", "--remode=const"],
    "value clipping": ["--clip-grad=0.1", "--clip-mode=value"],
    "adaptive clipping": ["--clip-grad=0.01", "--clip-mode=agc"],
    "layer decay": ["--layer-decay=0.7"],
    "bce": ["--bce-loss", "--cutmix=1", "--bce-target-thresh=0.2", "--bce-sum"],
    "hard bce": ["--bce-loss"],
    "no smoothing": ["--smoothing=0"],
    "cutmix boxes": ["--cutmix-minmax", "0.2", "0.8", "--mixup-mode=elem", "--mixup-off-epoch=1"],
    "repeats": ["--aug-repeats=3"],
    "three augment": ["--aa=3a", "--train-crop-mode=rkrc", "--vflip=0.5"],
    "augmix": ["--aa=augmix-m3-w2"],
    "plain": ["--no-aug"],
    "growing": ["--img-size-schedule={0: 16, 1: 32}"],
    "ema warm-up": ["--ema", "--ema-warmup", "--eval-every=2"],
    "accumulation": ["--accum-steps=2", "--lr-base-scale=sqrt"],
    "plateau": ["--sched=plateau", "--patience-epochs=0"],
    **{name: [f"--opt={name}"] for name in ("sgd", "lamb", "lion", "muon", "lookahead_adam")},
    **{
        f"{name} schedule": [f"--sched={name}", "--warmup-epochs=0.5", "--decay-epochs=1"]
        for name in ("tanh", "step", "multistep", "poly", "constant")
    },
    **{
        name: [f"--sched={name}", "--warmup-epochs=0.2", "--decay-epochs=0.5"]
        for name in ("wsd", "rsqrt")
    },
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 7})


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("words", OPTIONS.values(), ids=OPTIONS)
def test_an_option_runs_and_resumes(words, images, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", *words)
    assert train(*arguments, "--epochs=1") == 0
    before = final_state(tmp_path / "run")
    assert train(*arguments, "--epochs=2", "--resume=auto") == 0
    after = final_state(tmp_path / "run")
    assert (before["epoch"], after["epoch"]) == (1, 2)
    assert all(torch.isfinite(value).all() for value in after["model"].values())
    assert after["skipped"] == 0


@pytest.mark.parametrize(
    ("wishes", "device", "expected"),
    [
        ({}, "cpu", True),
        ({}, "cuda", False),
        ({"channels_last": False}, "cpu", False),
        ({"channels_last": True, "amp": "bf16"}, "cpu", True),
        ({"amp": "bf16"}, "cpu", False),
        ({"compile": True}, "cpu", False),
        ({"fsdp": True}, "cpu", False),
    ],
)
def test_the_default_memory_format(wishes, device, expected):
    settled = build.resolve_memory_format(Recipe(**wishes), torch.device(device))
    assert settled.channels_last is expected


def test_a_run_says_which_memory_format_it_took(images, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--epochs=1", "--device=cpu")
    for name, words in (("open", []), ("first", ["--no-channels-last"])):
        assert train(*arguments, f"--name={name}", *words) == 0
        weight = final_state(tmp_path / name)["model"]["stem.0.conv.weight"]
        last = weight.is_contiguous(memory_format=torch.channels_last)
        assert load_recipe(tmp_path / name / "config.yaml").channels_last is (name == "open")
        assert last is (name == "open")


@every_family
def test_gradients_of_tiny_maps_in_channels_last(family):
    """oneDNN leaves some unwritten in bfloat16; freed memory is full of NaN here."""
    model = small(family).train().to(memory_format=torch.channels_last)
    out = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    out = sum(out) if isinstance(out, tuple) else out
    for bits in (12, 16, 18, 20, 22):
        torch.full((1 << bits,), float("nan"))
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_compile(images, tmp_path):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--epochs=1")
    assert train(*arguments, "--compile", "--ema") == 0
    assert not any("orig_mod" in key for key in final_state(tmp_path / "run")["model"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opt=adamx"], "opt='adamx'"),
        (["--opt-args={momentun: 1}"], "momentun"),
        (["--sched=wsd", "--decay-epochs=99"], "sched='wsd'"),
        (["--model=shvit_s9"], "shvit_s9"),
        (["--model-args={dimm: 3}"], "unknown keyword 'dimm'"),
        (["--checkpoint=nowhere.pt"], "nowhere.pt"),
        (["--device=nope"], "device nope cannot be used here: "),
        (["--device=cuda:99"], "device cuda:99 cannot be used here: "),
        (["--drop-path=2"], "drop_path must be at least 0 and below 1, not 2.0"),
        (["--model-args={depths: 3}"], "shvit_s1 with model_args {'depths': 3}: "),
        (["--opt-args={betas: [0.9]}"], "opt='adamw'"),
        (["--opt=adahessian"], "second derivatives"),
        (["--min-lr=0.1"], "min_lr must be at most 0.001, the learning rate"),
        (["--lr-cycle-limit=30", "--lr-cycle-mul=9"], "its cycles take"),
        (["--cutmix-minmax", "0.5", "0.51"], "that are pixels apart in images of 32 pixels"),
        (["--img-size=64", "--batch-size=1"], "cannot be trained with batches (1, 3, 64, 64)"),
        (["--resume=nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--num-classes=2"], "3 classes, the model's head only 2"),
    ],
)
def test_impossible_options(words, message, images, tmp_path, capsys):
    assert train(f"--data={images}", f"--output={tmp_path}", "--epochs=1", *words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_weights_that_would_run_code(images, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(bytes(range(256)))
    arguments = (f"--data={images}", f"--output={tmp_path}", "--epochs=1")
    assert train(*arguments, f"--checkpoint={path}") == 2
    said = capsys.readouterr().err
    assert "neither a torch.save file" in said and "weights_only" not in said
    assert said.count("\n") == 1


def test_the_learning_rate_follows_the_batch():
    recipe = Recipe(lr_base=1e-3, lr_base_size=1024, batch_size=64, accum_steps=2)
    assert optimization.learning_rate(recipe, world_size=4) == pytest.approx(0.5e-3)
    recipe.lr_base_scale = "sqrt"
    assert optimization.learning_rate(recipe, world_size=4) == pytest.approx(1e-3 * 0.5**0.5)
    recipe.lr = 0.1
    assert optimization.learning_rate(recipe, world_size=4) == 0.1


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
def test_every_optimizer_of_timm_is_reachable():
    refused = []
    for name in timm.optim.list_optimizers():
        try:
            optimization.build_optimizer(Recipe(opt=name), nn.Linear(4, 4), 1e-3)
        except RecipeError as error:
            refused.append(f"{name}: {error}")
    # These need another package or a GPU, or second derivatives.
    assert all(line.startswith(("fused", "bnb", "adahessian")) for line in refused), refused


def test_biases_and_norms_do_not_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = optimization.build_optimizer(Recipe(weight_decay=0.3), model, 1e-3)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.3, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("sched", ["cosine", "none"])
@pytest.mark.parametrize("opt", ["adamw", "lookahead_sgd", "muon"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_some_parameters_learn_slower(sched, opt, layer_decay):
    recipe = load_recipe(
        FOLDER / "litv2.yaml",
        {
            "model": "litv2_s",
            "data": "x",
            "sched": sched,
            "opt": opt,
            "layer_decay": layer_decay,
            "warmup_epochs": 0,
            "opt_eps": None,
        },
    )
    with outlines():
        model = backbones.create_model("litv2_s", depths=(1, 1, 1, 1))

    def rates(recipe):
        optimizer = optimization.build_optimizer(recipe, model, 1.0)
        optimization.build_scheduler(recipe, optimizer, 10)
        groups = optimizer.param_groups
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        by_id = {id(p): g["lr"] for g in groups for p in g["params"]}
        return {name: by_id[id(p)] for name, p in model.named_parameters()}

    common = rates(dataclasses.replace(recipe, lr_factors={}))
    own = rates(recipe)
    slow = {n for n in own if own[n] != common[n]}
    assert slow == {f"stages.{i}.downsample.conv.offset.weight" for i in (1, 2, 3)}
    assert all(own[n] == pytest.approx(0.01 * common[n]) for n in slow)
    if layer_decay:
        assert len(set(common.values())) > 4


@pytest.mark.parametrize("factors", [{"nothing": 0.1}, {"(": 0.1}, {"0": 0.0}, {"0": "much"}])
def test_factors_without_a_match_are_rejected(factors):
    with pytest.raises(RecipeError, match="lr_factors"):
        optimization.build_optimizer(Recipe(lr_factors=factors), nn.Linear(4, 4), 1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_events_for_tensorboard(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = (f"--data={images}", f"--output={tmp_path}", "--name=run", "--log-every=1")
    assert train(*arguments, "--epochs=2", "--tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for key in ("loss", "lr", "val_top1", "images_per_second"):
        written = [(event.step, event.value) for event in events.Scalars(key)]
        wanted = [(entry["update"], entry[key]) for entry in entries if key in entry]
        assert written == [(step, pytest.approx(value, rel=1e-5)) for step, value in wanted]


def test_reports_to_other_programs(images, tmp_path, monkeypatch, capsys):
    arguments = (f"--data={images}", f"--output={tmp_path}", "--epochs=1", "--log-every=1")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for words in (["--wandb=project"], ["--tensorboard"]):
        assert train(*arguments, *words) == 2
        assert "pip install" in capsys.readouterr().err

    seen = {}
    run = types.SimpleNamespace(
        log=lambda numbers, step: seen.setdefault(step, numbers), finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    written = []
    board = types.SimpleNamespace(add_scalar=lambda *a: written.append(a), close=lambda: None)
    module = types.SimpleNamespace(SummaryWriter=lambda folder: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert train(*arguments, "--name=run", "--wandb=project", "--tensorboard") == 0
    entries = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sorted(seen) == [1, 2, 3]
    assert seen[1]["loss"] == entries[0]["loss"]
    assert ("loss", entries[0]["loss"], 1) in written
