"""Optimizer and schedule of a recipe: any of timm's, tested before the run starts."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from backbones.common.errors import BUILDING_ERRORS, RecipeError
from backbones.common.messages import first_line, shown
from backbones.training.distillation import StudentWithExits
from backbones.training.recipe import Recipe


def images_per_update(recipe: Recipe, world_size: int) -> int:
    """The number of images per update, over all processes."""
    return recipe.batch_size * recipe.accum_steps * world_size


def learning_rate(recipe: Recipe, world_size: int) -> float:
    """``lr``, or ``lr_base`` scaled by the number of images per update."""
    if recipe.lr is not None:
        return recipe.lr
    ratio = images_per_update(recipe, world_size) / recipe.lr_base_size
    return recipe.lr_base * (ratio**0.5 if recipe.lr_base_scale == "sqrt" else ratio)


def build_optimizer(recipe: Recipe, network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Any of timm's optimizers, for a model and its exits, if it has any."""
    model = network.student if isinstance(network, StudentWithExits) else network
    try:
        _try_optimizer(recipe, lr, next(model.parameters()).device)
        optimizer = _create_optimizer(recipe, model, lr, recipe.layer_decay)
    except BUILDING_ERRORS as error:
        raise RecipeError(f"optimizer opt={recipe.opt!r}: {first_line(error)}") from error
    _split_groups(optimizer, _lr_factors(recipe.lr_factors, model))
    if isinstance(network, StudentWithExits):
        parameters = list(network.exits.parameters())
        for decay, chosen in (
            (0.0, [p for p in parameters if p.ndim <= 1]),
            (recipe.weight_decay, [p for p in parameters if p.ndim > 1]),
        ):
            optimizer.add_param_group({"params": chosen, "lr": lr, "weight_decay": decay})
    return optimizer


def _create_optimizer(
    recipe: Recipe, model: nn.Module, lr: float, layer_decay: float | None
) -> torch.optim.Optimizer:
    options = {**optimizer_kwargs(recipe), "lr": lr, "layer_decay": layer_decay}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(model, **options)
    return optimizer


def _try_optimizer(recipe: Recipe, lr: float, device: torch.device) -> None:
    """Take a step on a small layer, since many optimizers check their arguments only then."""
    layer = nn.Linear(4, 4, device=device)
    with torch.compiler.set_stance("force_eager"):  # some compile their steps, for half a minute
        optimizer = _create_optimizer(recipe, layer, lr, layer_decay=None)
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives, which this loop does not compute")
        layer(torch.ones(1, 4, device=device)).sum().backward()
        optimizer.step()


def _lr_factors(patterns: dict[str, Any], model: nn.Module) -> dict[int, float]:
    """``id`` of each parameter that matches a pattern → its factor."""
    factors: dict[int, float] = {}
    for pattern, factor in patterns.items():
        try:
            number, expression = float(factor), re.compile(pattern)
        except (*BUILDING_ERRORS, re.error) as error:
            text = f"lr_factors: {pattern!r}: {shown(factor)}: {first_line(error)}"
            raise RecipeError(text) from error
        chosen = [p for name, p in model.named_parameters() if expression.search(name)]
        if not chosen or not 0 < number < math.inf:
            raise RecipeError(
                f"lr_factors: {pattern!r}: {factor!r} matches {len(chosen)} parameters; give a "
                "pattern of names in model.named_parameters() and a factor > 0"
            )
        factors.update((id(p), number) for p in chosen)
    return factors


def _split_groups(optimizer: torch.optim.Optimizer, factors: dict[int, float]) -> None:
    """Put parameters with a factor into separate groups with lr_scale, for timm's schedulers."""
    for group in list(optimizer.param_groups):
        for factor in sorted({factors[id(p)] for p in group["params"] if id(p) in factors}):
            chosen = [p for p in group["params"] if factors.get(id(p)) == factor]
            group["params"] = [p for p in group["params"] if factors.get(id(p)) != factor]
            scale = factor * group.get("lr_scale", 1.0)
            # Not by add_param_group, which in wrappers such as Lookahead does not update the lists.
            optimizer.param_groups.append({**group, "params": chosen, "lr_scale": scale})


def build_scheduler(
    recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> tuple[Any, int]:
    """Any of timm's schedulers, and its number of epochs.

    It is stepped with every update, "plateau" with every epoch; "none" gives None.
    """
    try:
        options = {**scheduler_kwargs(recipe), "step_on_epochs": recipe.sched == "plateau"}
        scheduler, epochs = create_scheduler_v2(
            optimizer, updates_per_epoch=updates_per_epoch, **options
        )
    except BUILDING_ERRORS as error:
        raise RecipeError(f"schedule sched={recipe.sched!r}: {first_line(error)}") from error
    if scheduler is None:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler, int(epochs)
