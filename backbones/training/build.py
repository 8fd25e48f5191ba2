"""Builds the parts of a run from a recipe: model, preprocessing, batch augmentation, loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

import backbones
from backbones.common.errors import BUILDING_ERRORS, RecipeError
from backbones.common.messages import first_line, joined_lines, shown
from backbones.training.distillation import Loss, Objective, build_teacher
from backbones.training.diversity import DiverseAttention
from backbones.training.recipe import Recipe


def build_model(recipe: Recipe, num_classes: int | None, weights: bool = True) -> Any:
    """The recipe's model, with its initial weights if ``weights`` is true."""
    if not recipe.model:
        raise RecipeError("no model: give --model one of backbones.list_models()")
    # Keys without a value may be in model_args instead.
    keys: dict[str, Any] = {"num_classes": num_classes, "in_chans": recipe.in_chans}
    keys |= {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    keys["global_pool"] = recipe.global_pool
    try:
        model = backbones.create_model(
            recipe.model,
            pretrained=recipe.pretrained and weights,
            checkpoint_path=recipe.checkpoint if weights else None,
            **{key: value for key, value in keys.items() if value is not None},
            **recipe.model_args,
        )
    except BUILDING_ERRORS as error:
        text = joined_lines(error)
        if not isinstance(error, (ValueError, OSError)):  # these have readable messages
            if recipe.model_args:
                arguments = shown(recipe.model_args)
                text = f"{recipe.model} with model_args {arguments}: {first_line(error)}"
            elif not isinstance(error, TypeError):
                raise  # a bug
        raise RecipeError(text) from error
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def resolve_memory_format(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with ``channels_last`` resolved; if unset, to what trains faster on the device.

    Not used in bfloat16, because oneDNN leaves parts of the weight gradient uninitialised for
    strided channels-last depthwise convolutions on a map of one pixel (torch 2.13).
    """
    if recipe.channels_last is not None:
        return recipe
    plain = recipe.amp is None and not recipe.compile and not recipe.fsdp
    return dataclasses.replace(recipe, channels_last=plain and device.type == "cpu")


class BatchAugmentation:
    """Random erasing, then mixup or CutMix, on a batch on the device.

    Both use the global random generators, whose states are saved in checkpoints.
    """

    def __init__(self, recipe: Recipe, num_classes: int, device: torch.device) -> None:
        self.off_epoch = recipe.mixup_off_epoch
        self.erase = self.mix = None
        if recipe.reprob > 0:
            self.erase = RandomErasing(
                recipe.reprob, mode=recipe.remode, max_count=recipe.recount, device=device
            )
        if recipe.mixes_images:
            self.mix = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                cutmix_minmax=recipe.cutmix_minmax,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                mode=recipe.mixup_mode,
                label_smoothing=recipe.smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels (B,) → images and labels (B,), (B, classes) if mixed."""
        if self.erase is not None:
            images = self.erase(images)
        if self.mix is not None:
            self.mix.mixup_enabled = not self.off_epoch or epoch < self.off_epoch
            images, labels = self.mix(images, labels)
        return images, labels


def build_loss(recipe: Recipe) -> Loss:
    """The training loss: logits (B, classes) and labels, hard or soft → scalar."""
    if recipe.bce_loss:
        return BinaryCrossEntropy(
            smoothing=recipe.smoothing,  # of hard labels; mixed ones are smoothed already
            target_threshold=recipe.bce_target_thresh,
            sum_classes=recipe.bce_sum,
        )
    if recipe.mixes_images:
        return SoftTargetCrossEntropy()
    if recipe.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=recipe.smoothing)
    return nn.CrossEntropyLoss()


def build_objective(
    recipe: Recipe,
    num_classes: int,
    config: dict[str, Any],
    multi_label: bool,
    device: torch.device,
) -> Objective | DiverseAttention:
    """The objective, a callable: network, images and targets → loss and logits.

    Targets are (B, classes) of 0 and 1 if ``multi_label``. The student's preprocessing is
    ``config``.
    """
    if multi_label and (recipe.mixes_images or recipe.distill is not None):
        raise RecipeError("multi-label data does not support mixup, cutmix or distill")
    teacher = None
    if recipe.distill is not None:
        teacher = build_teacher(recipe, num_classes, config).to(device)
    loss = _multi_label_loss if multi_label else build_loss(recipe)
    objective = Objective(loss, recipe, teacher)
    if not recipe.attn_diversity:
        return objective
    return DiverseAttention(objective, recipe.attn_diversity)


def _multi_label_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


class RunningStatsGuard:
    """Backs up a model's buffers, to restore them after a bad step.

    A forward pass on a batch with NaN corrupts BatchNorm's running statistics permanently.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = list(model.buffers())
        self.copies = [b.clone() for b in self.buffers]

    def keep(self) -> None:
        """Copy the buffers."""
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    def restore(self) -> None:
        """Restore the buffers."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)
