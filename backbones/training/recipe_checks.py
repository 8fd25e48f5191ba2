"""What the values of a recipe may be, each for itself and together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backbones.training.errors import RecipeError

if TYPE_CHECKING:
    from backbones.training.recipe import Recipe

__all__ = ["check"]

_FSDP_OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "nadamw", "sgd")


def check(recipe: Recipe) -> None:
    """Refuse values outside their range, and keys that contradict each other.

    Raises:
        RecipeError: naming the key, its value and what would be right.
    """
    for name in ("batch_size", "accum_steps", "epochs", "eval_every", "log_every", "in_chans"):
        _require(recipe, name, getattr(recipe, name) >= 1, "at least 1")
    for name in ("workers", "save_every_steps", "save_every_minutes", "aug_repeats", "smoothing"):
        _require(recipe, name, getattr(recipe, name) >= 0, "at least 0")
    for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "max_corrupt"):
        _require(recipe, name, 0 <= getattr(recipe, name) <= 1, "within 0 and 1")
    _require(recipe, "threads", recipe.threads is None or recipe.threads >= 1, "at least 1")
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
