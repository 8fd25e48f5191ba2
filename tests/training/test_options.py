"""Every option of a recipe has its effect."""

import dataclasses
import json
import math
import shlex
import shutil
import sys
import time
import types
from pathlib import Path

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from safetensors import safe_open
from scipy import ndimage
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_runs import final_state, make_images, same, train
from zoo import outlines

import backbones
from backbones.common.errors import RecipeError
from backbones.core.base import StagedBackbone
from backbones.training import build, optimization
from backbones.training.command_line import load_recipe
from backbones.training.loop import TrainingLoop
from backbones.training.recipe import Recipe
from backbones.training.resumable import load_state

FOLDER = Path(__file__).parents[2] / "configs" / "cls"
LOSSES = (
    *(nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy),
    BinaryCrossEntropy,
)


class Run:
    """A training of epochs of three updates, and what torch's hooks saw of it."""

    def __init__(self, folder, *words):
        self.folder, self.words = folder / "run", words
        self.images, self.validated, self.losses, self.kinds = [], [], [], set()
        self.convolutions, self.optimizer, self.steps = 0, "", []
        hooks = (
            register_module_forward_hook(self.saw_module),
            register_optimizer_step_pre_hook(self.saw_step),
        )
        try:
            assert train(f"--output={folder}", "--name=run", "--epochs=1", *words) == 0
        finally:
            for hook in hooks:
                hook.remove()
        self.state = load_state(self.folder / "last.pt")
        self.rows = self.state["history"]
        self.recipe = load_recipe(self.folder / "config.yaml")

    def saw_module(self, module, inputs, output):
        if isinstance(module, StagedBackbone):
            if not module.training:
                self.validated.append(inputs[0])
            elif torch.is_grad_enabled():
                self.images.append(inputs[0].detach().clone())
                self.model = module
        elif isinstance(module, nn.Conv2d) and module.training and output.requires_grad:
            self.kinds.add(output.dtype)
            self.convolutions += 1
        elif isinstance(module, LOSSES) and output.requires_grad:
            logits, targets = inputs
            self.losses.append((logits.detach(), targets, output.detach()))

    def saw_step(self, optimizer, *_):
        if not hasattr(self, "model"):
            return  # a step on a small layer tests the optimizer before the run
        self.optimizer = type(optimizer).__name__
        own = dict(self.model.named_parameters())
        self.steps.append(
            {
                "rates": [group["lr"] for group in optimizer.param_groups],
                "gradients": {n: p.grad.clone() for n, p in own.items() if p.grad is not None},
                "weights": {n: p.detach().clone() for n, p in own.items()},
            }
        )

    @property
    def before(self):
        return load_state(self.folder / "last.prev.pt")

    @property
    def gradients(self):
        return self.steps[-1]["gradients"]

    @property
    def seen(self):
        return torch.cat(self.images)

    @property
    def targets(self):
        return [targets for _, targets, _ in self.losses]


def norms(run):
    """Largest ratio of a filter's gradient to its weights, of the classifier and of the rest."""
    ratios = {True: 0.0, False: 0.0}
    for name, gradient in run.gradients.items():
        weight = run.steps[-1]["weights"][name]
        flat = [t.flatten(1) if t.ndim > 1 else t[None] for t in (gradient, weight)]
        gradients, weights = (t.norm(dim=1) for t in flat)
        ratio = (gradients / weights.clamp(min=1e-3)).max().item()
        of_head = name.startswith("head")
        ratios[of_head] = max(ratios[of_head], ratio)
    return ratios[True], ratios[False]


def follows(loss):
    """Whether the first loss is that of its logits and targets."""
    return lambda run, plain: torch.allclose(run.losses[0][2], loss(*run.losses[0][:2]))


def smooth(targets, smoothing=0.1):
    return F.one_hot(targets, 3) * (1 - smoothing) + smoothing / 3


def summed_bce(logits, targets):
    return 3 * F.binary_cross_entropy_with_logits(logits, (targets > 0.2).float())


def boxes(run):
    """The number of erased boxes in each image, which are the only exact zeros."""
    erased = (run.seen == 0).all(1).numpy()
    return [ndimage.label(image)[1] for image in erased]


def mixed(targets):
    """For each image, whether its target has two classes; the smoothing gives all a little."""
    return ((targets > 0.1 / 3 + 1e-6).sum(1) == 2).tolist() if targets.ndim == 2 else []


def share(targets):
    """Of each image's first class in the target, without the smoothing."""
    return ((targets.max(1).values - 0.1 / 3) / 0.9).tolist()


def distinct(targets):
    return {round(part, 4) for batch in targets for part in share(batch)}


def averaged(decays):
    """Whether the average is that of the weights after each update, and is the best."""

    def check(run, plain):
        if "model_ema" not in run.state:
            return False
        name = "stem.0.conv.weight"
        later = [step["weights"][name] for step in run.steps[1:]]
        average = torch.zeros(())
        for weight, decay in zip([*later, run.state["model"][name]], decays, strict=True):
            average = decay * average + (1 - decay) * weight
        with safe_open(run.folder / "best.safetensors", "pt") as file:
            best = file.get_tensor(name)
        average_saved = run.state["model_ema"][name]
        return torch.allclose(average_saved, average, atol=1e-7) and torch.equal(
            best, average_saved
        )

    return check


def differs(run, plain):
    """What the network sees in training is another image, and in the validation the same."""
    return not torch.equal(run.seen, plain.seen) and same(run.validated, plain.validated)


def rates(*wanted):
    return lambda run, plain: [max(s["rates"]) for s in run.steps] == pytest.approx(wanted)


def uses(name):
    return lambda run, plain: run.optimizer.lower() == name


def unlike(run, plain):
    """The same images, and other logits."""
    logits = [r.losses[-1][0] for r in (run, plain)]
    return same(run.images, plain.images) and not torch.equal(*logits)


# Words, and what they change: true of a run with them, and false of one without any.
OPTIONS = {
    "bf16": ("--amp=bf16", lambda r, _: r.kinds == {torch.bfloat16}),
    "fp16": (
        "--amp=fp16 --clip-grad=1 --epochs=2",
        lambda r, _: r.kinds == {torch.float16} and r.state["scaler"]["scale"] > 0,
    ),
    "contiguous": (
        "--no-channels-last",
        lambda r, _: all(x.is_contiguous() for x in r.images) and r.recipe.channels_last is False,
    ),
    "checkpointing": (
        "--grad-checkpointing",
        lambda r, plain: r.convolutions > plain.convolutions and same(r.gradients, plain.gradients),
    ),
    "clipped norm": (
        "--clip-grad=0.1",
        lambda r, _: torch.stack([g.norm() for g in r.gradients.values()]).norm() <= 0.1001,
    ),
    "clipped values": (
        "--clip-grad=0.001 --clip-mode=value",
        lambda r, _: max(g.abs().max() for g in r.gradients.values()) <= 0.001001,
    ),
    "adaptive clipping": (
        "--clip-grad=0.001 --clip-mode=agc",
        lambda r, _: norms(r)[1] <= 0.0011 < norms(r)[0],
    ),
    "layer decay": (
        "--layer-decay=0.7 --log-every=1",
        lambda r, _: (
            len(set(r.steps[-1]["rates"])) > 3
            and r.rows[-1]["lr"] == max(r.state["optimizer"]["param_groups"], key=lr_of)["lr"]
        ),
    ),
    # --- losses
    "no smoothing": ("--smoothing=0", follows(F.cross_entropy)),
    "bce": ("--bce-loss", follows(lambda x, t: F.binary_cross_entropy_with_logits(x, smooth(t)))),
    "bce of mixed labels": (
        "--bce-loss --bce-sum --bce-target-thresh=0.2 --cutmix=1",
        lambda r, _: any(mixed(r.targets[0])) and follows(summed_bce)(r, _),
    ),
    # --- mixing
    "mixup": (
        "--mixup=1",
        lambda r, _: any(mixed(r.targets[0])) and len(distinct(r.targets[:1])) == 2,
    ),
    "cutmix": (
        "--mixup=1 --cutmix=1 --mixup-switch-prob=1",
        # Boxes of whole pixels.
        lambda r, _: all(
            t.ndim == 2 and all(abs(1024 * s - round(1024 * s)) < 1e-2 for s in share(t))
            for t in r.targets
        ),
    ),
    "cutmix of some": (
        "--cutmix-minmax 0.2 0.8 --mixup-mode=elem --mixup-off-epoch=1 --epochs=2",
        lambda r, _: (
            any(mixed(r.targets[0]))
            and len(distinct(r.targets[:3])) > 6
            and not any(any(mixed(t)) for t in r.targets[3:])
        ),
    ),
    "mixing of no batch": (
        "--mixup=1 --mixup-prob=0",
        lambda r, _: all(mixed(t) == 8 * [False] for t in r.targets),
    ),
    # --- images
    "grey": ("--in-chans=1", lambda r, _: r.seen.shape[1] == r.validated[0].shape[1] == 1),
    "erasing": ("--reprob=1 --remode=const", lambda r, _: set(boxes(r)) == {1}),
    "erased boxes": ("--reprob=1 --remode=const --recount=5", lambda r, _: max(boxes(r)) > 1),
    "random filling": ("--reprob=1 --remode=rand", differs),
    "three augment": ("--aa=3a", differs),
    "augmix": ("--aa=augmix-m3-w2", differs),
    "crop": ("--train-crop-mode=rkrc", differs),
    "scale": ("--scale 0.9 1", differs),
    "ratio": ("--ratio 2 3", differs),
    "jitter": ("--color-jitter=0", differs),
    "blur": ("--gaussian-blur-prob=1", differs),
    "interpolation in training": ("--train-interpolation=nearest", differs),
    "greyscale": (
        "--grayscale-prob=1 --mean 0 0 0 --std 1 1 1",
        lambda r, _: torch.equal(r.seen[:, 0], r.seen[:, 2]),
    ),
    "normalisation": (
        "--mean 0 0 0 --std 1 1 1",
        lambda r, _: all(x.min() >= 0 and x.max() <= 1 for x in (r.seen, r.validated[0])),
    ),
    "no augmentation": (
        "--no-aug --epochs=2",
        lambda r, _: len(r.seen.unique(dim=0)) <= 26 < len(r.seen),
    ),
    "repeats": ("--no-aug --aug-repeats=3", lambda r, _: len(r.seen[:24].unique(dim=0)) == 8),
    "size": ("--img-size=48", lambda r, _: r.images[0].shape == (8, 3, 48, 48)),
    "growing": (
        "'--img-size-schedule={0: 16, 1: 32}' --epochs=2",
        # What is tried before the run leaves no trace in the norms' statistics.
        lambda r, _: (
            [x.shape[-1] for x in r.images] == 3 * [16] + 3 * [32]
            and all(
                v == 6 for k, v in r.state["model"].items() if k.endswith("num_batches_tracked")
            )
        ),
    ),
    "crop of the validation": (
        "--crop-pct=0.5",
        lambda r, plain: (
            same(r.images[0], plain.images[0]) and not same(r.validated, plain.validated)
        ),
    ),
    "batches of the validation": (
        "--val-batch-size=3",
        lambda r, _: [len(x) for x in r.validated[:3]] == [3, 3, 1],
    ),
    "seed": ("--seed=1", differs),
    # --- the network
    "dropout": ("--drop=0.5", unlike),
    "stochastic depth": ("--drop-path=0.5", unlike),
    # --- optimizer and schedule
    "accumulation": (
        "--accum-steps=2 --lr=none --lr-base-scale=sqrt --warmup-epochs=0 --epochs=2",
        lambda r, _: len(r.steps) == 2 and r.recipe.lr == pytest.approx(1e-3 / 8),
    ),
    "cosine": (
        "--sched=cosine --warmup-epochs=0 --min-lr=0 --epochs=2",
        rates(*(5e-4 * (1 + math.cos(math.pi * n / 6)) for n in range(6))),
    ),
    "plateau": (
        "--sched=plateau --patience-epochs=2 --warmup-epochs=0 --min-lr=0 --lr=1e-6 --epochs=4",
        # The score stays, so that the first epoch is the best, and the third one after it too bad.
        lambda r, _: (
            [row["lr"] for row in r.rows] == [1e-6] * 4
            and r.state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-7)
            and best_epoch(r) == 1
        ),
    ),
    "sgd": ("--opt=sgd", uses("sgd")),
    "lamb": ("--opt=lamb", uses("lamb")),
    "lion": ("--opt=lion", uses("lion")),
    "muon": ("--opt=muon --epochs=2", uses("muon")),
    "lookahead": (
        "--opt=lookahead_adam --weight-decay=0 --epochs=2",
        lambda r, _: "lookahead_slow_buff" in r.state["optimizer"]["state"][0],
    ),
    # --- averages
    "ema": ("--ema --ema-decay=0.5 --eval-every=2 --epochs=2", averaged([0, *[0.5] * 5])),
    "ema warm-up": (
        "--ema --ema-warmup --eval-every=2 --epochs=2",
        averaged([1 - (1 + n) ** (-2 / 3) for n in range(6)]),
    ),
    # --- the run
    "rare validation": (
        "--eval-every=2 --epochs=3",
        lambda r, _: [row["epoch"] for row in r.rows if "val_loss" in row] == [1, 2],
    ),
    "saving after some updates": (
        "--save-every-steps=4 --epochs=2",
        lambda r, _: len(r.steps) == 6 and r.before["updates"] == 4,
    ),
    "saving after some time": (
        "--save-every-minutes=1e-9",
        lambda r, _: (r.folder / "last.prev.pt").exists() and r.before["updates"] == 3,
    ),
    "rare logs": (
        "--log-every=2 --epochs=2",
        lambda r, _: [e["update"] for e in entries(r.folder) if "loss" in e] == [2, 4, 6],
    ),
}
# What has a state of its own resumes bit for bit.
RESUMED = ("fp16", "plateau", "muon", "lookahead", "ema warm-up", "rare validation", "growing")


def lr_of(group):
    return group["lr"]


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def best_epoch(run):
    with safe_open(run.folder / "best.safetensors", "pt") as file:
        return int(file.metadata()["epoch"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 7})


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("plain"), f"--data={images}")


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_its_effect(name, images, plain, tmp_path):
    words, is_there = OPTIONS[name]
    run = Run(tmp_path, f"--data={images}", *shlex.split(words))
    assert is_there(run, plain) and not is_there(plain, plain)
    assert all(value.isfinite().all() for value in run.state["model"].values())
    # Sums are of an epoch, and the last one has ended.
    assert run.state["skipped"] == run.state["seconds"] == run.state["waited"] == 0
    assert not run.state["ranks"][0]["meter"].any()
    assert run.rows[-1]["seconds"] > 0 < run.rows[-1]["data_wait"] < 1
    if name in RESUMED:
        ended = final_state(run.folder)
        shutil.copy(run.folder / "last.prev.pt", run.folder / "last.pt")
        assert train(f"--output={tmp_path}", "--name=run", *run.words, "--resume=auto") == 0
        assert same(final_state(run.folder), ended)


SCHEDULES = [
    # Keys, and the rate after so many of ten updates an epoch.
    ("warmup_epochs=2 warmup_lr=0.1", {0: 0.1, 10: 0.55, 20: 1.0}),
    ("warmup_epochs=2 warmup_lr=0.1 sched=cosine", {0: 0.1, 10: 0.55, 20: 0.5, 30: 0.1464466}),
    ("warmup_epochs=2 warmup_prefix=true sched=cosine", {20: 1.0, 40: 0.5, 60: 0.0}),
    ("sched=cosine min_lr=0.2", {0: 1.0, 20: 0.6, 40: 0.2}),
    ("sched=cosine lr_k_decay=2", {20: 0.8535534}),
    ("sched=cosine lr_cycle_limit=2 lr_cycle_decay=0.5", {40: 0.5, 60: 0.25, 80: 0.0}),
    ("sched=cosine lr_cycle_limit=2 lr_cycle_mul=2 lr_cycle_decay=1", {40: 1.0, 80: 0.5}),
    ("sched=cosine cooldown_epochs=3", {60: 0.0}),
    ("sched=poly decay_rate=2", {20: 0.25}),
    ("sched=step decay_rate=0.5 decay_epochs=1.5", {14: 1.0, 15: 0.5, 30: 0.25}),
    ("sched=multistep decay_rate=0.5 decay_milestones=[1,3]", {10: 0.5, 28: 0.5, 30: 0.25}),
    ("sched=tanh", {0: 1.0, 20: 0.5 * (1 + math.tanh(2))}),
    ("sched=wsd decay_epochs=2", {0: 1.0, 20: 1.0, 30: 1 - 0.5**0.5}),
    ("sched=constant", {39: 1.0}),
]
EPOCHS = {
    "warmup_prefix=true": 6,
    "lr_cycle_limit=2": 8,
    "lr_cycle_mul=2": 12,
    "cooldown_epochs=3": 7,
}


@pytest.mark.parametrize(("words", "wanted"), SCHEDULES)
def test_schedules(words, wanted):
    keys = dict(word.split("=") for word in f"sched=constant {words}".split())
    plain = {"model": "x", "warmup_epochs": 0, "min_lr": 0, "epochs": 4, "lr": 1.0}
    recipe = load_recipe(None, {**plain, **keys})
    optimizer = optimization.build_optimizer(recipe, nn.Linear(4, 4), recipe.lr)
    schedule, epochs = optimization.build_scheduler(recipe, optimizer, 10)
    assert epochs == max([4, *(count for key, count in EPOCHS.items() if key in words)])
    for update, rate in wanted.items():
        schedule.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-6), update


@pytest.mark.parametrize(
    ("wishes", "device", "expected"),
    [
        ({}, "cpu", True),
        ({}, "cuda", False),
        ({"channels_last": True, "amp": "bf16"}, "cpu", True),
        ({"amp": "bf16"}, "cpu", False),
        ({"compile": True}, "cpu", False),
        ({"fsdp": True}, "cpu", False),
    ],
)
def test_the_default_memory_format(wishes, device, expected):
    settled = build.resolve_memory_format(Recipe(**wishes), torch.device(device))
    assert settled.channels_last is expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_compile(runs):
    runs.train("--epochs=1", "--compile", "--ema")
    assert not any("orig_mod" in key for key in runs.state()["model"])


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
        (["--img-size=64", "--batch-size=1"], "cannot be trained with batches of (1, 3, 64, 64)"),
        (["--resume=nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--num-classes=2"], "3 classes, the model's head only 2"),
    ],
)
def test_impossible_options(words, message, runs):
    assert message in runs.refuse("--epochs=1", *words)


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
    keys = {"model": "litv2_s", "data": "x", "warmup_epochs": 0, "opt_eps": None}
    keys |= {"sched": sched, "opt": opt, "layer_decay": layer_decay}
    recipe = load_recipe(FOLDER / "litv2.yaml", keys)
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


def test_minutes_between_saves():
    run = types.SimpleNamespace(recipe=Recipe(save_every_minutes=15), updates=0)
    for minutes, due in ((14, False), (16, True)):
        run.saved = time.monotonic() - 60 * minutes
        assert TrainingLoop.is_save_due(run) is due


@pytest.mark.parametrize("factors", [{"nothing": 0.1}, {"(": 0.1}, {"0": 0.0}, {"0": "much"}])
def test_factors_without_a_match_are_rejected(factors):
    with pytest.raises(RecipeError, match="lr_factors"):
        optimization.build_optimizer(Recipe(lr_factors=factors), nn.Linear(4, 4), 1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_events_for_tensorboard(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train("--log-every=1", "--epochs=2", "--tensorboard")
    events = EventAccumulator(str(runs.folder))
    events.Reload()
    for key in ("loss", "lr", "val_top1", "images_per_second"):
        written = [(event.step, event.value) for event in events.Scalars(key)]
        wanted = [(entry["update"], entry[key]) for entry in entries(runs.folder) if key in entry]
        assert written == [(step, pytest.approx(value, rel=1e-5)) for step, value in wanted]


def test_reports_to_weights_and_biases(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for word in ("--wandb=project", "--tensorboard"):
        assert "pip install" in runs.refuse(word)

    seen = {}
    run = types.SimpleNamespace(
        log=lambda numbers, step: seen.setdefault(step, numbers), finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    runs.train("--epochs=1", "--log-every=1", "--wandb=project")
    assert sorted(seen) == [1, 2, 3]
    assert seen[1]["loss"] == entries(runs.folder)[0]["loss"]
