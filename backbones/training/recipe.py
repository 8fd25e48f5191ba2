"""A training recipe: one dataclass whose keys come from YAML and a table of variants."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from backbones.training.errors import RecipeError

__all__ = [
    "FIELDS",
    "Recipe",
    "differences",
    "dump_recipe",
    "fields_of",
    "inner_type",
    "load_recipe",
    "nearest",
]


def _key(group: str, default: Any, help: str, choices: Sequence[Any] = ()) -> Any:
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
    """

    refused: ClassVar[frozenset[str]] = frozenset()

    # --- the model
    model: str = _key("model", "", "name of the model, see backbones.list_models()")
    pretrained: bool = _key("model", False, "start from the published weights")
    checkpoint: str | None = _key("model", None, "start from the weights in this file")
    num_classes: int | None = _key("model", None, "None: as many as the data has")
    in_chans: int = _key("model", 3, "channels of the input; 1 reads grey images")
    drop: float | None = _key("model", None, "dropout before the classifier; None: as published")
    drop_path: float | None = _key("model", None, "stochastic depth; None: as published")
    global_pool: str | None = _key("model", None, "pooling of the head; None: as published")
    model_args: dict[str, Any] = _key("model", {}, "further keywords of backbones.create_model")

    # --- the data
    data: str = _key(
        "data",
        "",
        "folder of train/ and val/ (or .tar files), digits, medmnist/NAME, torch/NAME, "
        "wds/FOLDER, hfds/NAME, hfids/NAME",
    )
    data_dir: str | None = _key("data", None, "where medmnist/, torch/, hfds/, hfids/ keep files")
    train_split: str = _key("data", "train", "name (wds: shard pattern) of the training split")
    val_split: str = _key("data", "validation", "name (wds: shard pattern) of the other split")
    num_samples: int | None = _key("data", None, "training images, where the source cannot tell")
    val_num_samples: int | None = _key("data", None, "the same for validation")
    class_map: str | None = _key("data", None, "file that maps class names to numbers")
    input_key: str | None = _key("data", None, "image column or suffix (hfds, hfids, wds)")
    target_key: str | None = _key("data", None, "label column or field (hfds, hfids, wds)")
    download: bool = _key("data", False, "let the source download its files")
    batch_size: int = _key("data", 128, "images per step and process")
    val_batch_size: int | None = _key("data", None, "None: batch_size")
    workers: int = _key("data", 4, "loader processes per training process; 0: load in the loop")
    pin_memory: bool = _key("data", True, "page-locked batches, on a GPU")
    max_corrupt: float = _key("data", 0.001, "stop when more than this share cannot be decoded")

    # --- preprocessing; None takes the model's own
    img_size: int | None = _key("preprocessing", None, "side of the square input, in pixels")
    img_size_schedule: dict[int, int] = _key(
        "preprocessing", {}, "training size from an epoch on, such as {0: 128, 100: 160}"
    )
    crop_pct: float | None = _key("preprocessing", None, "share of the image that validation sees")
    crop_mode: str | None = _key(
        "preprocessing", None, "how validation crops", (None, "center", "squash", "border")
    )
    interpolation: str | None = _key(
        "preprocessing", None, "resizing at validation", (None, "bilinear", "bicubic", "nearest")
    )
    train_interpolation: str = _key(
        "preprocessing",
        "random",
        "resizing in training",
        ("random", "bilinear", "bicubic", "nearest"),
    )
    mean: tuple[float, ...] | None = _key("preprocessing", None, "per channel, of pixels in 0..1")
    std: tuple[float, ...] | None = _key("preprocessing", None, "per channel, of pixels in 0..1")

    # --- augmentation
    no_aug: bool = _key("augmentation", False, "only resize and crop")
    train_crop_mode: str | None = _key(
        "augmentation", None, "None: random resized crop", (None, "rrc", "rkrc", "rkrr")
    )
    scale: tuple[float, ...] = _key("augmentation", (0.08, 1.0), "area of the random crop")
    ratio: tuple[float, ...] = _key("augmentation", (0.75, 4 / 3), "aspect of the random crop")
    hflip: float = _key("augmentation", 0.5, "probability of a horizontal flip")
    vflip: float = _key("augmentation", 0.0, "probability of a vertical flip")
    color_jitter: float = _key("augmentation", 0.4, "strength; unused with aa")
    grayscale_prob: float = _key("augmentation", 0.0, "probability of a grey image")
    gaussian_blur_prob: float = _key("augmentation", 0.0, "probability of a blurred image")
    aa: str | None = _key(
        "augmentation", None, "rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a (3-Augment), …"
    )
    reprob: float = _key("augmentation", 0.0, "probability of random erasing")
    remode: str = _key("augmentation", "pixel", "what erasing leaves", ("const", "rand", "pixel"))
    recount: int = _key("augmentation", 1, "erased boxes per image, at most")
    aug_repeats: int = _key("augmentation", 0, "repeated augmentation: copies of each image")
    mixup: float = _key("augmentation", 0.0, "mixup alpha")
    cutmix: float = _key("augmentation", 0.0, "CutMix alpha")
    cutmix_minmax: tuple[float, ...] | None = _key(
        "augmentation", None, "box size instead of alpha"
    )
    mixup_prob: float = _key("augmentation", 1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = _key("augmentation", 0.5, "of CutMix where both are on")
    mixup_mode: str = _key(
        "augmentation", "batch", "what is drawn at once", ("batch", "pair", "elem")
    )
    mixup_off_epoch: int = _key("augmentation", 0, "no mixing from this epoch on; 0: always mix")

    # --- the loss
    smoothing: float = _key("loss", 0.1, "label smoothing")
    bce_loss: bool = _key("loss", False, "binary cross-entropy over the classes")
    bce_target_thresh: float | None = _key("loss", None, "soft targets above it become 1")
    bce_sum: bool = _key("loss", False, "sum over the classes instead of the mean")

    # --- a teacher
    distill: str | None = _key(
        "distillation",
        None,
        "learn from a teacher: its soft labels, its hard ones, or One-for-All with exits",
        (None, "soft", "hard", "ofa"),
    )
    teacher: str | None = _key("distillation", None, "a model of this library, or timm/NAME")
    teacher_checkpoint: str | None = _key("distillation", None, "its weights: a file")
    teacher_pretrained: bool = _key("distillation", False, "its weights: the published ones")
    teacher_args: dict[str, Any] = _key("distillation", {}, "further keywords of its create_model")
    teacher_img_size: int | None = _key(
        "distillation", None, "side of its images; None: its own where fixed, else the student's"
    )
    distill_alpha: float = _key("distillation", 0.5, "share of the teacher's loss, 0 … 1")
    distill_temperature: float = _key("distillation", 1.0, "softens both predictions (soft, ofa)")
    ofa_gamma: float = _key("distillation", 1.5, "how much a sure teacher enhances the truth, ≥ 1")
    ofa_stages: tuple[int, ...] | None = _key(
        "distillation", None, "stages of the student with an exit; None: all"
    )

    # --- the optimizer
    opt: str = _key("optimizer", "adamw", "any of timm.optim.list_optimizers()")
    lr: float | None = _key("optimizer", None, "learning rate; None: from lr_base")
    lr_base: float = _key("optimizer", 1e-3, "learning rate for lr_base_size images per update")
    lr_base_size: int = _key("optimizer", 1024, "see lr_base")
    lr_base_scale: str | None = _key(
        "optimizer", "linear", "how lr grows with the batch", ("linear", "sqrt")
    )
    weight_decay: float = _key("optimizer", 0.05, "not applied to biases and norms")
    momentum: float = _key("optimizer", 0.9, "for those that have one")
    opt_eps: float | None = _key("optimizer", None, "None: the optimizer's own")
    opt_betas: tuple[float, ...] | None = _key("optimizer", None, "None: the optimizer's own")
    opt_args: dict[str, Any] = _key("optimizer", {}, "further keywords of the optimizer")
    layer_decay: float | None = _key("optimizer", None, "learning rate factor from layer to layer")
    lr_factors: dict[str, Any] = _key(
        "optimizer", {}, "pattern of parameter names (re.search): factor on their learning rate"
    )
    clip_grad: float | None = _key("optimizer", None, "None: gradients are not clipped")
    clip_mode: str = _key("optimizer", "norm", "what clip_grad limits", ("norm", "value", "agc"))
    accum_steps: int = _key("optimizer", 1, "batches per update")

    # --- the schedule
    epochs: int = _key("schedule", 300, "length of the training, without cooldown_epochs")
    sched: str = _key(
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
    warmup_epochs: float = _key("schedule", 5.0, "linear rise at the start")
    warmup_lr: float = _key("schedule", 1e-6, "where it starts")
    warmup_prefix: bool = _key("schedule", False, "warm up before the schedule, not inside it")
    cooldown_epochs: int = _key("schedule", 0, "epochs at min_lr after the schedule")
    min_lr: float = _key("schedule", 1e-5, "where the schedule ends")
    decay_epochs: float | None = _key("schedule", None, "step: interval; wsd, rsqrt: tail")
    decay_milestones: tuple[int, ...] = _key("schedule", (90, 180, 270), "multistep")
    decay_rate: float = _key("schedule", 0.1, "step, multistep, plateau: factor; poly: power")
    patience_epochs: int = _key("schedule", 10, "plateau")
    lr_cycle_limit: int = _key("schedule", 1, "cosine, tanh, poly: number of cycles")
    lr_cycle_mul: float = _key("schedule", 1.0, "cosine, tanh, poly: growth of the cycles")
    lr_cycle_decay: float = _key("schedule", 0.1, "cosine, tanh, poly: decay from cycle to cycle")
    lr_k_decay: float = _key("schedule", 1.0, "cosine, poly: k-decay")

    # --- the moving average of the weights
    ema: bool = _key("ema", False, "keep one, validate it and save it as the best weights")
    ema_decay: float = _key("ema", 0.9999, "share of the old average that an update keeps")
    ema_warmup: bool = _key("ema", False, "let the decay rise from 0 to ema_decay")

    # --- speed
    device: str | None = _key("speed", None, "None: a GPU if there is one, otherwise cpu")
    threads: int | None = _key("speed", None, "CPU threads per process; None: torch's choice")
    amp: str | None = _key("speed", None, "mixed precision", (None, "bf16", "fp16"))
    channels_last: bool = _key("speed", False, "NHWC memory layout")
    compile: bool = _key("speed", False, "torch.compile")
    grad_checkpointing: bool = _key("speed", False, "recompute activations, to save memory")
    sync_bn: bool = _key("speed", False, "BatchNorm statistics over all processes")
    fsdp: bool = _key("speed", False, "share out weights, gradients and averages (FSDP2)")

    # --- the run
    output: str = _key("run", "runs", "folder of all runs")
    name: str | None = _key("run", None, "folder of this one; None: config-model, numbered")
    overwrite: bool = _key("run", False, "replace an earlier run of the same name")
    resume: str | None = _key("run", None, "auto: go on with this run if it began; or a path")
    seed: int = _key("run", 42, "of everything that is random")
    save_every_steps: int = _key("run", 0, "checkpoint within an epoch, in updates; 0: never")
    save_every_minutes: float = _key("run", 15.0, "the same by the clock; 0: never")
    eval_every: int = _key("run", 1, "epochs between two validations")
    log_every: int = _key("run", 50, "updates between two entries of metrics.jsonl")
    max_bad_steps: int = _key("run", 10, "updates in a row with a non-finite loss before stopping")
    tensorboard: bool = _key("run", False, "write TensorBoard events too")
    wandb: str | None = _key("run", None, "Weights & Biases project to report to")


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
        path: a YAML file of keys. Its ``variants`` maps model names to keys that differ; where it
            has one, the model must be in it.
        overrides: keys that win, values as in YAML or as strings from a command line.
        recipe_class: the kind of recipe.

    Raises:
        RecipeError: an unknown key (the nearest are named), a value of the wrong type, a model
            that ``variants`` lacks, a file that is missing or no YAML mapping, values that
            contradict each other.
    """
    fields = fields_of(recipe_class)
    overrides = dict(overrides or {})
    keys = _read_yaml(Path(path)) if path is not None else {}
    variants = keys.pop("variants", None)
    where = str(path)
    _refuse_unknown(keys, where, fields)
    if variants is not None:
        if not isinstance(variants, dict):
            raise RecipeError(f"{where}: variants must map model names to keys")
        model = overrides.get("model", keys.get("model", ""))
        if model not in variants:
            raise RecipeError(f"{where}: {nearest('model', str(model), variants)}")
        row = variants[model] or {}
        _refuse_unknown(row, f"{where}, variant {model}", fields)
        keys = {**keys, "model": model, **row}
    _refuse_unknown(overrides, "command line", fields)
    hints = typing.get_type_hints(recipe_class)
    values = {k: _coerce(fields[k], hints[k], v) for k, v in {**keys, **overrides}.items()}
    recipe = recipe_class(**values)
    _check(recipe)
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
    """The keys that change a result and differ from those of an earlier run, for people."""
    lines = []
    for name, f in fields_of(type(recipe)).items():
        before, now = earlier.get(name), getattr(recipe, name)
        if f.metadata["group"] != "run" and before != now:
            lines.append(f"{name}: {before} → {now}")
    return lines


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(keys, dict):
        raise RecipeError(f"{path} must be a mapping of recipe keys, not {type(keys).__name__}")
    return keys


def _refuse_unknown(keys: Mapping[str, Any], where: str, fields: Mapping[str, Any]) -> None:
    for key in keys:
        if key not in fields:
            raise RecipeError(f"{where}: {nearest('key', str(key), fields)}")


def nearest(kind: str, value: str, valid: Iterable[str]) -> str:
    """A sentence that names the valid names closest to a wrong one."""
    names = list(valid)
    near = difflib.get_close_matches(value, names, n=4, cutoff=0.5) or sorted(names)[:12]
    return f"unknown {kind} {value!r}; did you mean {', '.join(near)}?"


def inner_type(hint: Any) -> Any:
    """``int`` of ``int | None``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _coerce(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint`` of a key. YAML 1.1 reads 1e-3 as a string; flags all are."""
    name, inner = f.name, inner_type(hint)
    if inner is not hint and (value is None or str(value).lower() in ("none", "null")):
        converted: Any = None
    else:
        try:
            converted = _convert(inner, value)
        except (TypeError, ValueError, yaml.YAMLError):
            label = getattr(inner, "__name__", str(inner)) if inner in _SCALARS else str(inner)
            raise RecipeError(f"{name} must be {label}, not {value!r}") from None
    choices = f.metadata["choices"]
    if choices and converted not in choices:
        raise RecipeError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
    return converted


_SCALARS = (int, float, str, bool)
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return _TRUTH[value.lower()] if str(value).lower() in _TRUTH else _fail(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            _fail(value)
        return int(value)
    if kind is float:
        return _fail(value) if isinstance(value, bool) else float(value)
    if kind is str:
        return value if isinstance(value, str) else _fail(value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            value = yaml.safe_load(value) if value.startswith("[") else value.split(",")
        elif len(value) == 1 and isinstance(value[0], str):
            return _convert(kind, value[0])
        return tuple(_convert(typing.get_args(kind)[0], v) for v in value)
    if isinstance(value, str):
        value = yaml.safe_load(value)
    if not isinstance(value, dict):
        _fail(value)
    key_type, value_type = typing.get_args(kind)
    if value_type is Any:
        return {_convert(key_type, k): v for k, v in value.items()}
    return {_convert(key_type, k): _convert(value_type, v) for k, v in value.items()}


def _fail(value: Any) -> Any:
    raise ValueError(value)


def _check(recipe: Recipe) -> None:
    """Refuse values outside their range, and keys that contradict each other."""
    for name in ("batch_size", "accum_steps", "epochs", "eval_every", "log_every", "in_chans"):
        _require(recipe, name, getattr(recipe, name) >= 1, "at least 1")
    for name in ("workers", "save_every_steps", "save_every_minutes", "aug_repeats", "smoothing"):
        _require(recipe, name, getattr(recipe, name) >= 0, "at least 0")
    for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "max_corrupt"):
        _require(recipe, name, 0 <= getattr(recipe, name) <= 1, "within 0 and 1")
    for name in ("scale", "ratio"):
        _require(recipe, name, len(getattr(recipe, name)) == 2, "two numbers")
    for name in ("mean", "std"):
        value = getattr(recipe, name)
        good = value is None or len(value) == recipe.in_chans
        _require(recipe, name, good, f"{recipe.in_chans} numbers, one a channel")
    if recipe.pretrained and recipe.checkpoint:
        raise RecipeError("pretrained and checkpoint exclude each other: give one of them")
    _check_teacher(recipe)
    _check_fsdp(recipe)
    mixes = recipe.mixup > 0 or recipe.cutmix > 0 or recipe.cutmix_minmax is not None
    if mixes and recipe.batch_size % 2:
        raise RecipeError(f"mixup and cutmix need an even batch_size, not {recipe.batch_size}")


def _check_teacher(recipe: Recipe) -> None:
    if recipe.distill is None:
        if recipe.teacher:
            raise RecipeError(f"teacher {recipe.teacher!r} without distill: soft, hard or ofa?")
        return
    weights = (recipe.teacher_checkpoint is not None) + recipe.teacher_pretrained
    if not recipe.teacher or weights != 1:
        raise RecipeError(
            f"distill {recipe.distill!r} needs a teacher and its weights: either "
            "teacher_checkpoint or teacher_pretrained"
        )
    _require(recipe, "distill_alpha", 0 <= recipe.distill_alpha <= 1, "within 0 and 1")
    _require(recipe, "distill_temperature", recipe.distill_temperature > 0, "above 0")
    _require(recipe, "ofa_gamma", recipe.ofa_gamma >= 1, "at least 1")


_FSDP_OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "nadamw", "sgd")


def _check_fsdp(recipe: Recipe) -> None:
    """Refuse what needs whole weights, or values of all processes that it does not ask for."""
    if not recipe.fsdp:
        return
    _require(recipe, "opt", recipe.opt in _FSDP_OPTIMIZERS, f"of {_FSDP_OPTIMIZERS} with fsdp")
    for name, good, instead in (
        ("clip_mode", recipe.clip_mode != "agc" or recipe.clip_grad is None, "norm or value"),
        ("amp", recipe.amp != "fp16", "bf16"),
        ("channels_last", not recipe.channels_last, "false"),
        ("compile", not recipe.compile, "false"),
        ("distill", recipe.distill != "ofa", "soft or hard"),
    ):
        _require(recipe, name, good, f"{instead} with fsdp")


def _require(recipe: Recipe, name: str, good: bool, what: str) -> None:
    if not good:
        raise RecipeError(f"{name} must be {what}, not {getattr(recipe, name)!r}")
