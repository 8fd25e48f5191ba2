"""A training recipe: every key with its type, range and meaning, and rules for several keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from backbones.common.errors import RecipeError
from backbones.common.keys import Range, fields_of, key
from backbones.common.messages import shown
from backbones.core.loaded import NetworkKeys
from backbones.data.splits import DataKeys

_GROUPS = (
    *("model", "data", "preprocessing", "augmentation", "loss", "distillation"),
    *("optimizer", "schedule", "ema", "speed", "run"),
)
# Declare a key of each group.
_MODEL, _DATA, _PREPARE, _AUGMENT, _LOSS, _DISTILL, _OPTIMIZE, _SCHEDULE, _AVERAGE, _SPEED, _RUN = (
    partial(key, group) for group in _GROUPS
)

_SHARE = Range(low=0, high=1)
_SHARE_BELOW_1 = Range(low=0, below=1)
_COUNT = Range(low=1, high=10**6)
_EPOCHS_OR_0 = Range(low=0, high=10**6)
_PIXELS = Range(low=1, high=2**14)
_RATE = Range(low=0, high=1000)

_SCHEDULES = (
    *("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"),
    *("plateau", "none"),
)
_FSDP_OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "nadamw", "sgd")
_FALLING_TO_MIN_LR = ("cosine", "tanh", "poly", "wsd", "rsqrt", "plateau")
_FALLING_BY_A_FACTOR = ("step", "multistep", "plateau")

# Policies of timm's augmentation, the key ``aa``, and the values of their sections.
_WHOLE, _REAL, _FLAG = r"[1-9]\d?", r"\d{1,3}(\.\d+)?", "[01]"
_POLICIES: Mapping[str, Mapping[str, str]] = {
    "rand": {
        **{"m": r"\d{1,2}", "n": _WHOLE, "p": r"[01](\.\d+)?", "mstd": _REAL, "mmax": _WHOLE},
        **{"inc": _FLAG, "t": "weights|3aw?"},
    },
    "augmix": {
        **{"m": r"\d{1,2}", "w": _WHOLE, "d": _WHOLE, "a": rf"(?!0(\.0+)?$){_REAL}", "b": _FLAG},
        "mstd": _REAL,
    },
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), {"mstd": _REAL}),
}


@dataclass
class Recipe(DataKeys, NetworkKeys):
    """Every key of a classification recipe, with its default. Names follow timm's ``train.py``.

    ``python train_cls.py --help`` prints this list. "None" stands for YAML's ``null``.
    """

    groups: ClassVar[tuple[str, ...]] = _GROUPS  # in this order
    refused: ClassVar[frozenset[str]] = frozenset()  # inherited keys that another kind lacks

    # --- the model
    pretrained: bool = _MODEL(False, "start from the published weights")
    checkpoint: str | None = _MODEL(None, "start from the weights in this file")
    drop: float | None = _MODEL(
        None, "dropout before the classifier; None: as published", _SHARE_BELOW_1
    )
    drop_path: float | None = _MODEL(None, "stochastic depth; None: as published", _SHARE_BELOW_1)

    # --- the data
    val_batch_size: int | None = _DATA(None, "None: batch_size", _COUNT)
    workers: int = _DATA(
        4, "loader processes per training process; 0: load in the loop", Range(low=0, high=1024)
    )
    pin_memory: bool = _DATA(True, "page-locked batches, on a GPU")
    max_corrupt: float = _DATA(0.001, "stop if more than this fraction cannot be decoded", _SHARE)

    # --- preprocessing; None takes the model's own
    img_size_schedule: dict[int, int] = _PREPARE(
        {},
        "training size by first epoch, such as {0: 128, 100: 160}",
        Range(low=1, high=2**14, keys=_EPOCHS_OR_0),
    )
    train_interpolation: str = _PREPARE(
        "random", "interpolation in training", ("random", "bilinear", "bicubic", "nearest")
    )

    # --- augmentation
    no_aug: bool = _AUGMENT(False, "only resize and crop")
    train_crop_mode: str | None = _AUGMENT(
        None, "None: random resized crop", (None, "rrc", "rkrc", "rkrr")
    )
    scale: tuple[float, ...] = _AUGMENT(
        (0.08, 1.0), "area of the random crop", Range(above=0, high=1, counts=(2,), rising=True)
    )
    ratio: tuple[float, ...] = _AUGMENT(
        (0.75, 4 / 3),
        "aspect of the random crop",
        Range(low=0.01, high=100, counts=(2,), rising=True),
    )
    hflip: float = _AUGMENT(0.5, "probability of a horizontal flip", _SHARE)
    vflip: float = _AUGMENT(0.0, "probability of a vertical flip", _SHARE)
    color_jitter: float = _AUGMENT(0.4, "strength; unused with aa", Range(low=0, high=10))
    grayscale_prob: float = _AUGMENT(0.0, "probability of a greyscale image", _SHARE)
    gaussian_blur_prob: float = _AUGMENT(0.0, "probability of a blurred image", _SHARE)
    aa: str | None = _AUGMENT(
        None, "rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a (3-Augment), …"
    )
    reprob: float = _AUGMENT(0.0, "probability of random erasing", _SHARE)
    remode: str = _AUGMENT("pixel", "fill of erased boxes", ("const", "rand", "pixel"))
    recount: int = _AUGMENT(1, "erased boxes per image, at most", Range(low=1, high=100))
    aug_repeats: int = _AUGMENT(
        0, "repeated augmentation: copies of each image", Range(low=0, high=100)
    )
    mixup: float = _AUGMENT(0.0, "mixup alpha", Range(low=0, high=1000))
    cutmix: float = _AUGMENT(0.0, "CutMix alpha", Range(low=0, high=1000))
    cutmix_minmax: tuple[float, ...] | None = _AUGMENT(
        None, "box size instead of alpha", Range(low=0, high=1, counts=(2,), rising=True)
    )
    mixup_prob: float = _AUGMENT(1.0, "probability that a batch is mixed", _SHARE)
    mixup_switch_prob: float = _AUGMENT(0.5, "probability of CutMix if both are on", _SHARE)
    mixup_mode: str = _AUGMENT("batch", "granularity of mixing", ("batch", "pair", "elem"))
    mixup_off_epoch: int = _AUGMENT(0, "stop mixing at this epoch; 0: always mix", _EPOCHS_OR_0)

    # --- the loss
    smoothing: float = _LOSS(0.1, "label smoothing", _SHARE_BELOW_1)
    bce_loss: bool = _LOSS(False, "binary cross-entropy over the classes")
    bce_target_thresh: float | None = _LOSS(None, "soft targets above it become 1", _SHARE)
    bce_sum: bool = _LOSS(False, "sum over the classes instead of the mean")
    aux_weight: float = _LOSS(
        0.4, "weight of an auxiliary head's loss, where there is one", Range(low=0, high=1000)
    )
    attn_diversity: float = _LOSS(
        0.0,
        "weight of the attention diversification loss (published: 1); 0: none",
        Range(low=0, high=1000),
    )

    # --- a teacher
    distill: str | None = _DISTILL(
        None,
        "learn from a teacher: its soft labels, its hard ones, or One-for-All with exits",
        (None, "soft", "hard", "ofa"),
    )
    teacher: str | None = _DISTILL(None, "a model of this library, or timm/NAME")
    teacher_checkpoint: str | None = _DISTILL(None, "its weights: a file")
    teacher_pretrained: bool = _DISTILL(False, "its weights: the published ones")
    teacher_args: dict[str, Any] = _DISTILL({}, "further keywords of its create_model")
    teacher_img_size: int | None = _DISTILL(
        None, "size of its images; None: its own if fixed, else the student's", _PIXELS
    )
    distill_alpha: float = _DISTILL(0.5, "weight of the teacher's loss, 0 … 1", _SHARE)
    distill_temperature: float = _DISTILL(
        1.0, "softens both predictions (soft, ofa)", Range(low=0.01, high=1000)
    )
    ofa_gamma: float = _DISTILL(
        1.5, "exponent of the weight of the true class, ≥ 1", Range(low=1, high=100)
    )
    ofa_stages: tuple[int, ...] | None = _DISTILL(
        None, "stages of the student with an exit; None: all", Range(low=-100, high=100)
    )

    # --- the optimizer
    opt: str = _OPTIMIZE("adamw", "any of timm.optim.list_optimizers()")
    lr: float | None = _OPTIMIZE(None, "learning rate; None: from lr_base", _RATE)
    lr_base: float = _OPTIMIZE(1e-3, "learning rate for lr_base_size images per update", _RATE)
    lr_base_size: int = _OPTIMIZE(1024, "see lr_base", Range(low=1, high=10**9))
    lr_base_scale: str | None = _OPTIMIZE(
        "linear", "how lr grows with the batch", ("linear", "sqrt")
    )
    weight_decay: float = _OPTIMIZE(0.05, "not applied to biases and norms", Range(low=0, high=100))
    momentum: float = _OPTIMIZE(0.9, "for optimizers that have one", _SHARE_BELOW_1)
    opt_eps: float | None = _OPTIMIZE(None, "None: the optimizer's own", Range(above=0, high=1))
    opt_betas: tuple[float, ...] | None = _OPTIMIZE(
        None, "None: the optimizer's own", Range(low=0, below=1, counts=(1, 2, 3))
    )
    opt_args: dict[str, Any] = _OPTIMIZE({}, "further keywords of the optimizer")
    layer_decay: float | None = _OPTIMIZE(
        None, "learning rate decay from layer to layer", Range(above=0, high=1)
    )
    lr_factors: dict[str, Any] = _OPTIMIZE(
        {}, "regular expression for parameter names: factor on their learning rate"
    )
    clip_grad: float | None = _OPTIMIZE(
        None, "None: gradients are not clipped", Range(above=0, high=10**9)
    )
    clip_mode: str = _OPTIMIZE("norm", "quantity that clip_grad limits", ("norm", "value", "agc"))
    accum_steps: int = _OPTIMIZE(1, "batches per update", _COUNT)

    # --- the schedule
    epochs: int = _SCHEDULE(300, "length of the training, without cooldown_epochs", _COUNT)
    sched: str = _SCHEDULE("cosine", "how the learning rate falls", _SCHEDULES)
    warmup_epochs: float = _SCHEDULE(5.0, "linear rise at the start", _EPOCHS_OR_0)
    warmup_lr: float = _SCHEDULE(1e-6, "learning rate at the start of the warm-up", _RATE)
    warmup_prefix: bool = _SCHEDULE(False, "warm up before the schedule, not inside it")
    cooldown_epochs: int = _SCHEDULE(0, "epochs at min_lr after the schedule", _EPOCHS_OR_0)
    min_lr: float = _SCHEDULE(1e-5, "learning rate at the end of the schedule", _RATE)
    decay_epochs: float | None = _SCHEDULE(
        None, "step: interval; wsd, rsqrt: tail", Range(above=0, high=10**6)
    )
    decay_milestones: tuple[int, ...] = _SCHEDULE(
        (90, 180, 270), "multistep", Range(low=1, high=10**6, rising=True)
    )
    decay_rate: float = _SCHEDULE(
        0.1, "step, multistep, plateau: factor; poly: power", Range(above=0, high=10)
    )
    patience_epochs: int = _SCHEDULE(10, "plateau", _EPOCHS_OR_0)
    lr_cycle_limit: int = _SCHEDULE(
        1, "cosine, tanh, poly: number of cycles", Range(low=1, high=1000)
    )
    lr_cycle_mul: float = _SCHEDULE(
        1.0, "cosine, tanh, poly: growth of the cycles", Range(low=1, high=100)
    )
    lr_cycle_decay: float = _SCHEDULE(0.1, "cosine, tanh, poly: decay from cycle to cycle", _SHARE)
    lr_k_decay: float = _SCHEDULE(1.0, "cosine, poly: k-decay", Range(above=0, high=10))

    # --- the moving average of the weights
    ema: bool = _AVERAGE(False, "keep one, validate it and save it as the best weights")
    ema_decay: float = _AVERAGE(
        0.9999, "fraction of the old average that an update keeps", _SHARE_BELOW_1
    )
    ema_warmup: bool = _AVERAGE(False, "let the decay rise from 0 to ema_decay")

    # --- speed
    device: str | None = _SPEED(None, "None: a GPU if there is one, otherwise cpu")
    threads: int | None = _SPEED(
        None, "CPU threads per process; None: torch's choice", Range(low=1, high=1024)
    )
    amp: str | None = _SPEED(None, "mixed precision", (None, "bf16", "fp16"))
    channels_last: bool | None = _SPEED(
        None, "NHWC memory layout; None: on a CPU without amp, compile and fsdp"
    )
    compile: bool = _SPEED(False, "torch.compile")
    grad_checkpointing: bool = _SPEED(False, "recompute activations, to save memory")
    sync_bn: bool = _SPEED(False, "BatchNorm statistics over all processes")
    fsdp: bool = _SPEED(False, "shard weights, gradients and averages (FSDP2)")
    fuse: bool = _SPEED(
        False, "at the end, compare accuracy and time before and after backbones.fuse, on the CPU"
    )

    # --- the run
    output: str = _RUN("runs", "folder of all runs")
    name: str | None = _RUN(None, "folder of this one; None: config-model, numbered")
    overwrite: bool = _RUN(False, "replace an earlier run of the same name")
    resume: str | None = _RUN(None, "auto: continue this run if it exists; or a path")
    save_every_steps: int = _RUN(
        0, "checkpoint within an epoch, in updates; 0: never", Range(low=0, high=10**9)
    )
    save_every_minutes: float = _RUN(
        15.0, "checkpoint every so many minutes; 0: never", Range(low=0, high=10**6)
    )
    eval_every: int = _RUN(1, "epochs between two validations", _COUNT)
    log_every: int = _RUN(
        50, "updates between two entries of metrics.jsonl", Range(low=1, high=10**9)
    )
    max_bad_steps: int = _RUN(10, "updates in a row with a non-finite loss before stopping", _COUNT)
    tensorboard: bool = _RUN(False, "also write TensorBoard events")
    wandb: str | None = _RUN(None, "Weights & Biases project to report to")

    @property
    def mixes_images(self) -> bool:
        """Whether batches are mixed by mixup or cutmix."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """Keys, whether they agree with the others, and what they must be."""
        for name, value in (("mean", self.mean), ("std", self.std)):
            good = value is None or len(value) == self.in_chans
            yield name, good, f"{self.in_chans} numbers, one a channel"
        good = self.sched not in _FALLING_BY_A_FACTOR or self.decay_rate <= 1
        yield "decay_rate", good, f"at most 1 with sched {self.sched}"
        # What needs full weights, or values of all processes without gathering them.
        for name, good, instead in (
            ("opt", self.opt in _FSDP_OPTIMIZERS, f"of {_FSDP_OPTIMIZERS}"),
            ("clip_mode", self.clip_mode != "agc" or self.clip_grad is None, "norm or value"),
            ("amp", self.amp != "fp16", "bf16"),
            ("channels_last", not self.channels_last, "false"),
            ("compile", not self.compile, "false"),
            ("distill", self.distill != "ofa", "soft or hard"),
        ):
            yield name, good or not self.fsdp, f"{instead} with fsdp"


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


FIELDS = fields_of(Recipe)


def differences(recipe: Recipe, earlier: Mapping[str, Any]) -> list[str]:
    """A description of the keys that affect results and differ from an earlier run's."""
    lines = []
    for name, f in fields_of(type(recipe)).items():
        before, now = earlier.get(name), getattr(recipe, name)
        if f.metadata["group"] != "run" and before != now:
            lines.append(f"{name}: {shown(before)} → {shown(now)}")
    return lines


def check(recipe: Recipe) -> None:
    """Reject contradictory keys."""
    for name, good, what in recipe.rules():
        if not good:
            raise RecipeError(f"{name} must be {what}, not {getattr(recipe, name)!r}")
    if recipe.aa is not None:
        _check_policy(recipe.aa)
    if recipe.pretrained and recipe.checkpoint:
        raise RecipeError("pretrained and checkpoint are mutually exclusive")
    if recipe.attn_diversity and (recipe.compile or recipe.grad_checkpointing):
        raise RecipeError("attn_diversity does not support compile or grad_checkpointing")
    if recipe.mixes_images and recipe.batch_size % 2:
        raise RecipeError(f"mixup and cutmix need an even batch_size, not {recipe.batch_size}")
    weights = (recipe.teacher_checkpoint is not None) + recipe.teacher_pretrained
    if recipe.distill is None and recipe.teacher:
        raise RecipeError(f"teacher {recipe.teacher!r} needs distill: soft, hard or ofa")
    if recipe.distill is not None and (not recipe.teacher or weights != 1):
        raise RecipeError(
            f"distill {recipe.distill!r} needs a teacher and its weights: either "
            "teacher_checkpoint or teacher_pretrained"
        )


def _check_policy(text: str) -> None:
    """Reject a policy that timm would misinterpret, partly ignore, or take forever to apply."""
    name, *sections = text.split("-")
    if name not in _POLICIES:
        raise RecipeError(f"aa must be a policy of {', '.join(_POLICIES)}, not {shown(text)}")
    known = _POLICIES[name]
    pattern = "|".join(f"{key}({value})" for key, value in known.items())
    for section in sections:
        if re.fullmatch(pattern, section, re.ASCII) is None:
            raise RecipeError(
                f"aa {shown(text)}: {name} may be followed by {', '.join(known)}, each with its "
                f"value, not {shown(section)}"
            )


def check_learning_rate(recipe: Recipe, lr: float) -> None:
    """Reject a schedule whose learning rate would rise from ``lr``, the scaled one, not fall."""
    if recipe.sched in _FALLING_TO_MIN_LR and recipe.min_lr > lr:
        raise RecipeError(
            f"min_lr must be at most {lr:g}, the learning rate where sched {recipe.sched} "
            f"starts, not {recipe.min_lr:g}"
        )
