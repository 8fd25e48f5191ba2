"""A training recipe: one dataclass whose keys come from YAML and a table of variants."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from backbones.common.errors import RecipeError
from backbones.core.messages import shown
from backbones.training.recipe_checks import check
from backbones.training.recipe_ranges import RANGES, Range
from backbones.training.recipe_values import as_type_of, nearest
from backbones.training.recipe_yaml import read_mapping

__all__ = [
    "FIELDS",
    "Recipe",
    "differences",
    "dump_recipe",
    "fields_of",
    "key",
    "load_recipe",
]


def key(group: str, default: Any, help: str, choices: Sequence[Any] = ()) -> Any:
    """A field of a recipe.

    Args:
        group: heading under which it is listed; ``"run"`` for keys that don't affect results.
        help: its line in ``--help`` and in written recipes.
        choices: allowed values; empty for any value of its type.
    """
    metadata = {"group": group, "help": help, "choices": tuple(choices)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Every key of a classification recipe, with its default. Names follow timm's ``train.py``.

    ``python train_cls.py --help`` prints this list. "None" stands for YAML's ``null``.

    Class attributes:
        refused: inherited keys that a recipe of another kind does not have.
        ranges: allowed range of every number.
    """

    refused: ClassVar[frozenset[str]] = frozenset()
    ranges: ClassVar[Mapping[str, Range]] = RANGES

    # --- the model
    model: str = key("model", "", "name of the model, see backbones.list_models()")
    pretrained: bool = key("model", False, "start from the published weights")
    checkpoint: str | None = key("model", None, "start from the weights in this file")
    num_classes: int | None = key("model", None, "None: as many as the data has")
    in_chans: int = key("model", 3, "channels of the input; 1: greyscale", (1, 3))
    drop: float | None = key("model", None, "dropout before the classifier; None: as published")
    drop_path: float | None = key("model", None, "stochastic depth; None: as published")
    global_pool: str | None = key("model", None, "pooling of the head; None: as published")
    model_args: dict[str, Any] = key("model", {}, "further keywords of backbones.create_model")

    # --- the data
    data: str = key(
        "data",
        "",
        "folder of train/ and val/ (or .tar files), digits, medmnist/NAME, torch/NAME, "
        "wds/FOLDER, hfds/NAME, hfids/NAME",
    )
    data_dir: str | None = key("data", None, "where medmnist/, torch/, hfds/, hfids/ keep files")
    train_split: str = key("data", "train", "name (wds: shard pattern) of the training split")
    val_split: str = key("data", "validation", "name (wds: shard pattern) of the other split")
    num_samples: int | None = key("data", None, "number of training images, if the source lacks it")
    val_num_samples: int | None = key("data", None, "the same for validation")
    class_map: str | None = key("data", None, "file that maps class names to numbers")
    input_key: str | None = key("data", None, "image column or suffix (hfds, hfids, wds)")
    target_key: str | None = key("data", None, "label column or field (hfds, hfids, wds)")
    download: bool = key("data", False, "let the source download its files")
    batch_size: int = key("data", 128, "images per step and process")
    val_batch_size: int | None = key("data", None, "None: batch_size")
    workers: int = key("data", 4, "loader processes per training process; 0: load in the loop")
    pin_memory: bool = key("data", True, "page-locked batches, on a GPU")
    max_corrupt: float = key("data", 0.001, "stop if more than this fraction cannot be decoded")

    # --- preprocessing; None takes the model's own
    img_size: int | None = key("preprocessing", None, "side of the square input, in pixels")
    img_size_schedule: dict[int, int] = key(
        "preprocessing", {}, "training size from an epoch on, such as {0: 128, 100: 160}"
    )
    crop_pct: float | None = key(
        "preprocessing", None, "fraction of the image that validation crops"
    )
    crop_mode: str | None = key(
        "preprocessing", None, "crop mode in validation", (None, "center", "squash", "border")
    )
    interpolation: str | None = key(
        "preprocessing",
        None,
        "interpolation in validation",
        (None, "bilinear", "bicubic", "nearest"),
    )
    train_interpolation: str = key(
        "preprocessing",
        "random",
        "interpolation in training",
        ("random", "bilinear", "bicubic", "nearest"),
    )
    mean: tuple[float, ...] | None = key("preprocessing", None, "per channel, of pixels in 0..1")
    std: tuple[float, ...] | None = key("preprocessing", None, "per channel, of pixels in 0..1")

    # --- augmentation
    no_aug: bool = key("augmentation", False, "only resize and crop")
    train_crop_mode: str | None = key(
        "augmentation", None, "None: random resized crop", (None, "rrc", "rkrc", "rkrr")
    )
    scale: tuple[float, ...] = key("augmentation", (0.08, 1.0), "area of the random crop")
    ratio: tuple[float, ...] = key("augmentation", (0.75, 4 / 3), "aspect of the random crop")
    hflip: float = key("augmentation", 0.5, "probability of a horizontal flip")
    vflip: float = key("augmentation", 0.0, "probability of a vertical flip")
    color_jitter: float = key("augmentation", 0.4, "strength; unused with aa")
    grayscale_prob: float = key("augmentation", 0.0, "probability of a greyscale image")
    gaussian_blur_prob: float = key("augmentation", 0.0, "probability of a blurred image")
    aa: str | None = key(
        "augmentation", None, "rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a (3-Augment), …"
    )
    reprob: float = key("augmentation", 0.0, "probability of random erasing")
    remode: str = key("augmentation", "pixel", "fill of erased boxes", ("const", "rand", "pixel"))
    recount: int = key("augmentation", 1, "erased boxes per image, at most")
    aug_repeats: int = key("augmentation", 0, "repeated augmentation: copies of each image")
    mixup: float = key("augmentation", 0.0, "mixup alpha")
    cutmix: float = key("augmentation", 0.0, "CutMix alpha")
    cutmix_minmax: tuple[float, ...] | None = key("augmentation", None, "box size instead of alpha")
    mixup_prob: float = key("augmentation", 1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = key("augmentation", 0.5, "probability of CutMix if both are on")
    mixup_mode: str = key(
        "augmentation", "batch", "granularity of mixing", ("batch", "pair", "elem")
    )
    mixup_off_epoch: int = key("augmentation", 0, "no mixing from this epoch on; 0: always mix")

    # --- the loss
    smoothing: float = key("loss", 0.1, "label smoothing")
    bce_loss: bool = key("loss", False, "binary cross-entropy over the classes")
    bce_target_thresh: float | None = key("loss", None, "soft targets above it become 1")
    bce_sum: bool = key("loss", False, "sum over the classes instead of the mean")
    aux_weight: float = key("loss", 0.4, "weight of an auxiliary head's loss, where there is one")
    attn_diversity: float = key(
        "loss", 0.0, "weight of the attention diversification loss (published: 1); 0: none"
    )

    # --- a teacher
    distill: str | None = key(
        "distillation",
        None,
        "learn from a teacher: its soft labels, its hard ones, or One-for-All with exits",
        (None, "soft", "hard", "ofa"),
    )
    teacher: str | None = key("distillation", None, "a model of this library, or timm/NAME")
    teacher_checkpoint: str | None = key("distillation", None, "its weights: a file")
    teacher_pretrained: bool = key("distillation", False, "its weights: the published ones")
    teacher_args: dict[str, Any] = key("distillation", {}, "further keywords of its create_model")
    teacher_img_size: int | None = key(
        "distillation", None, "side of its images; None: its own where fixed, else the student's"
    )
    distill_alpha: float = key("distillation", 0.5, "weight of the teacher's loss, 0 … 1")
    distill_temperature: float = key("distillation", 1.0, "softens both predictions (soft, ofa)")
    ofa_gamma: float = key("distillation", 1.5, "exponent of the weight of the true class, ≥ 1")
    ofa_stages: tuple[int, ...] | None = key(
        "distillation", None, "stages of the student with an exit; None: all"
    )

    # --- the optimizer
    opt: str = key("optimizer", "adamw", "any of timm.optim.list_optimizers()")
    lr: float | None = key("optimizer", None, "learning rate; None: from lr_base")
    lr_base: float = key("optimizer", 1e-3, "learning rate for lr_base_size images per update")
    lr_base_size: int = key("optimizer", 1024, "see lr_base")
    lr_base_scale: str | None = key(
        "optimizer", "linear", "how lr grows with the batch", ("linear", "sqrt")
    )
    weight_decay: float = key("optimizer", 0.05, "not applied to biases and norms")
    momentum: float = key("optimizer", 0.9, "for optimizers that have one")
    opt_eps: float | None = key("optimizer", None, "None: the optimizer's own")
    opt_betas: tuple[float, ...] | None = key("optimizer", None, "None: the optimizer's own")
    opt_args: dict[str, Any] = key("optimizer", {}, "further keywords of the optimizer")
    layer_decay: float | None = key("optimizer", None, "learning rate factor from layer to layer")
    lr_factors: dict[str, Any] = key(
        "optimizer", {}, "regular expression for parameter names: factor on their learning rate"
    )
    clip_grad: float | None = key("optimizer", None, "None: gradients are not clipped")
    clip_mode: str = key("optimizer", "norm", "what clip_grad limits", ("norm", "value", "agc"))
    accum_steps: int = key("optimizer", 1, "batches per update")

    # --- the schedule
    epochs: int = key("schedule", 300, "length of the training, without cooldown_epochs")
    sched: str = key(
        "schedule",
        "cosine",
        "how the learning rate falls",
        (
            "cosine",
            "tanh",
            "step",
            "multistep",
            "poly",
            "wsd",
            "rsqrt",
            "constant",
            "plateau",
            "none",
        ),
    )
    warmup_epochs: float = key("schedule", 5.0, "linear rise at the start")
    warmup_lr: float = key("schedule", 1e-6, "where it starts")
    warmup_prefix: bool = key("schedule", False, "warm up before the schedule, not inside it")
    cooldown_epochs: int = key("schedule", 0, "epochs at min_lr after the schedule")
    min_lr: float = key("schedule", 1e-5, "where the schedule ends")
    decay_epochs: float | None = key("schedule", None, "step: interval; wsd, rsqrt: tail")
    decay_milestones: tuple[int, ...] = key("schedule", (90, 180, 270), "multistep")
    decay_rate: float = key("schedule", 0.1, "step, multistep, plateau: factor; poly: power")
    patience_epochs: int = key("schedule", 10, "plateau")
    lr_cycle_limit: int = key("schedule", 1, "cosine, tanh, poly: number of cycles")
    lr_cycle_mul: float = key("schedule", 1.0, "cosine, tanh, poly: growth of the cycles")
    lr_cycle_decay: float = key("schedule", 0.1, "cosine, tanh, poly: decay from cycle to cycle")
    lr_k_decay: float = key("schedule", 1.0, "cosine, poly: k-decay")

    # --- the moving average of the weights
    ema: bool = key("ema", False, "keep one, validate it and save it as the best weights")
    ema_decay: float = key("ema", 0.9999, "fraction of the old average that an update keeps")
    ema_warmup: bool = key("ema", False, "let the decay rise from 0 to ema_decay")

    # --- speed
    device: str | None = key("speed", None, "None: a GPU if there is one, otherwise cpu")
    threads: int | None = key("speed", None, "CPU threads per process; None: torch's choice")
    amp: str | None = key("speed", None, "mixed precision", (None, "bf16", "fp16"))
    channels_last: bool | None = key(
        "speed", None, "NHWC memory layout; None: on a CPU without amp, compile and fsdp"
    )
    compile: bool = key("speed", False, "torch.compile")
    grad_checkpointing: bool = key("speed", False, "recompute activations, to save memory")
    sync_bn: bool = key("speed", False, "BatchNorm statistics over all processes")
    fsdp: bool = key("speed", False, "shard weights, gradients and averages (FSDP2)")

    # --- the run
    output: str = key("run", "runs", "folder of all runs")
    name: str | None = key("run", None, "folder of this one; None: config-model, numbered")
    overwrite: bool = key("run", False, "replace an earlier run of the same name")
    resume: str | None = key("run", None, "auto: continue this run if it exists; or a path")
    seed: int = key("run", 42, "seed of all random numbers")
    save_every_steps: int = key("run", 0, "checkpoint within an epoch, in updates; 0: never")
    save_every_minutes: float = key("run", 15.0, "the same, in minutes; 0: never")
    eval_every: int = key("run", 1, "epochs between two validations")
    log_every: int = key("run", 50, "updates between two entries of metrics.jsonl")
    max_bad_steps: int = key("run", 10, "updates in a row with a non-finite loss before stopping")
    tensorboard: bool = key("run", False, "also write TensorBoard events")
    wandb: str | None = key("run", None, "Weights & Biases project to report to")

    @property
    def mixes_images(self) -> bool:
        """Whether batches are mixed by mixup or cutmix."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def fields_of(recipe_class: type[Recipe]) -> dict[str, dataclasses.Field[Any]]:
    """The keys of a kind of recipe, by name."""
    fields = dataclasses.fields(recipe_class)
    return {f.name: f for f in fields if f.name not in recipe_class.refused}


FIELDS = fields_of(Recipe)


def load_recipe(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    recipe_class: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """Read a recipe: defaults, then the file, then its row for the model, then ``overrides``.

    Args:
        path: a YAML file of keys. Its ``variants``, if present, maps model names to keys that
            differ, and must include the model.
        overrides: keys that take precedence; values as in YAML, or strings from a command line.
        recipe_class: the kind of recipe.

    Raises:
        RecipeError: an unknown key (it suggests the closest), a value of the wrong type or out of
            range, a model missing from ``variants``, a missing file or one that is not a YAML
            mapping, or contradictory values.
    """
    fields = fields_of(recipe_class)
    overrides = dict(overrides or {})
    keys = read_mapping(Path(path)) if path is not None else {}
    variants = keys.pop("variants", None)
    where = str(path)
    _refuse_unknown(keys, where, fields)
    if variants is not None:
        model = overrides.get("model", keys.get("model", ""))
        keys = {**keys, "model": model, **_row(variants, model, where, fields)}
    _refuse_unknown(overrides, "command line", fields)
    hints = typing.get_type_hints(recipe_class)
    values = {k: as_type_of(fields[k], hints[k], v) for k, v in {**keys, **overrides}.items()}
    recipe = recipe_class(**values)
    check(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that :func:`load_recipe` reads back: every key, grouped and explained."""
    lines: list[str] = []
    group = ""
    for name, f in fields_of(type(recipe)).items():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# --- {group}"] if lines else [f"# --- {group}"]
        value = getattr(recipe, name)
        value = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        entry = f"{name}: {text.removesuffix('...' + chr(10)).strip()}"
        lines.append(f"{entry:<32} # {f.metadata['help']}")
    return "\n".join(lines) + "\n"


def differences(recipe: Recipe, earlier: Mapping[str, Any]) -> list[str]:
    """A description of the keys that affect results and differ from those of an earlier run."""
    lines = []
    for name, f in fields_of(type(recipe)).items():
        before, now = earlier.get(name), getattr(recipe, name)
        if f.metadata["group"] != "run" and before != now:
            lines.append(f"{name}: {shown(before)} → {shown(now)}")
    return lines


def _row(variants: Any, model: Any, where: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a model in the table of variants."""
    if not isinstance(variants, dict):
        raise RecipeError(f"{where}: variants must map model names to keys")
    model = model if isinstance(model, str) else shown(model)
    if model not in variants:
        raise RecipeError(f"{where}: {nearest('model', model, variants)}")
    row = variants[model] or {}
    if not isinstance(row, dict):
        raise RecipeError(f"{where}, variant {model}: must be a mapping of keys, not {shown(row)}")
    _refuse_unknown(row, f"{where}, variant {model}", fields)
    return row


def _refuse_unknown(keys: Mapping[str, Any], where: str, fields: Mapping[str, Any]) -> None:
    for key in keys:
        if key not in fields:
            raise RecipeError(f"{where}: {nearest('key', str(key), fields)}")
