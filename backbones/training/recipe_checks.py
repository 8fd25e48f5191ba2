"""Checks of a recipe's values and of their combinations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from backbones.common.errors import RecipeError
from backbones.training.auto_augment import check_policy
from backbones.training.recipe_ranges import check_ranges

if TYPE_CHECKING:
    from backbones.training.recipe import Recipe

__all__ = ["check", "check_learning_rate", "check_sizes"]

_FSDP_OPTIMIZERS = ("adam", "adamw", "lion", "momentum", "nadamw", "sgd")
_FALLING_TO_MIN_LR = ("cosine", "tanh", "poly", "wsd", "rsqrt", "plateau")
_FALLING_BY_A_FACTOR = ("step", "multistep", "plateau")


def check(recipe: Recipe) -> None:
    """Reject values out of range and contradictory keys.

    Raises:
        RecipeError: names the key, its value and what is allowed.
    """
    check_ranges(vars(recipe), recipe.ranges)
    for name in ("mean", "std"):
        value = getattr(recipe, name)
        good = value is None or len(value) == recipe.in_chans
        _require(recipe, name, good, f"{recipe.in_chans} numbers, one a channel")
    if recipe.aa is not None:
        check_policy(recipe.aa)
    if recipe.sched in _FALLING_BY_A_FACTOR:
        what = f"at most 1 with sched {recipe.sched}"
        _require(recipe, "decay_rate", recipe.decay_rate <= 1, what)
    if recipe.pretrained and recipe.checkpoint:
        raise RecipeError("pretrained and checkpoint exclude each other: give one of them")
    if recipe.attn_diversity and (recipe.compile or recipe.grad_checkpointing):
        raise RecipeError("attn_diversity does not support compile or grad_checkpointing")
    _check_teacher(recipe)
    _check_fsdp(recipe)
    if recipe.mixes_images and recipe.batch_size % 2:
        raise RecipeError(f"mixup and cutmix need an even batch_size, not {recipe.batch_size}")


def check_learning_rate(recipe: Recipe, lr: float) -> None:
    """Reject a schedule whose learning rate would rise instead of falling.

    Args:
        lr: the recipe's learning rate, after scaling.

    Raises:
        RecipeError: names both learning rates.
    """
    if recipe.sched in _FALLING_TO_MIN_LR and recipe.min_lr > lr:
        raise RecipeError(
            f"min_lr must be at most {lr:g}, the learning rate where sched {recipe.sched} "
            f"starts, not {recipe.min_lr:g}"
        )


def check_sizes(recipe: Recipe, sizes: Iterable[int]) -> None:
    """Reject ranges of CutMix boxes of less than a pixel.

    Args:
        sizes: sides of the training images.

    Raises:
        RecipeError: names the smallest size.
    """
    if recipe.cutmix_minmax is None:
        return
    size = min(sizes)
    low, high = (int(size * share) for share in recipe.cutmix_minmax)
    what = f"two shares that are pixels apart in images of {size} pixels"
    _require(recipe, "cutmix_minmax", low < high, what)


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


def _check_fsdp(recipe: Recipe) -> None:
    """Reject options that need full weights, or values of all processes without gathering them."""
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
