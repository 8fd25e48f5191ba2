"""The main function of the training scripts, from command line to finished run."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from backbones.common.console import guard
from backbones.common.errors import DataError, MendableError, memory_shortage
from backbones.common.files import write_problem, write_text_atomically
from backbones.common.keys import dump
from backbones.common.messages import first_line
from backbones.common.processes import World, world_of_processes
from backbones.common.progress import Progress
from backbones.common.signals import StopRequest, stop_on_signals
from backbones.training.command_line import parse_command_line
from backbones.training.folder import RunFolder
from backbones.training.loop import TrainingLoop
from backbones.training.recipe import AnyRecipe, Recipe

_BuildTrainer = Callable[[Any, Path, World, StopRequest, Progress], TrainingLoop]


def run_from_command_line(
    build_trainer: _BuildTrainer,
    recipe_class: type[AnyRecipe],
    argv: Sequence[str] | None = None,
    description: str = "",
) -> int:
    """Read the recipe, build the trainer, resume if requested, and train.

    Returns the exit status of :func:`backbones.common.console.guard`, or 128 + the signal that
    stopped the run. ``description`` introduces ``--help``.
    """

    def command() -> int:
        recipe, options = parse_command_line(argv, description, recipe_class)
        if options.print_config:
            sys.stdout.write(dump(recipe))
            return 0
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        with stop_on_signals() as stop, world_of_processes(recipe.device) as world:
            try:
                return _train(build_trainer, recipe, options, world, stop)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, MendableError) or (advice := _advice(error)) is None:
                    raise
                raise MendableError(advice) from error

    return guard(command)


def _advice(error: MemoryError | RuntimeError) -> str | None:
    """Advice if memory ran out; None for other errors."""
    text = first_line(error)
    if text.startswith("DataLoader worker"):
        why = "usually for lack of memory: lower workers or batch_size"
        return f"a loader process was ended by the system, {why} ({text})"
    if memory_shortage(error) is not None:
        return f"out of memory: lower batch_size, img_size or workers ({text})"
    return None


def _train(
    build_trainer: _BuildTrainer,
    recipe: Recipe,
    options: Namespace,
    world: World,
    stop: StopRequest,
) -> int:
    progress = Progress(world.is_main)
    folder = RunFolder(recipe, options, world)
    path = folder.path
    if folder.lock_problem:
        progress.say(
            f"{path} is not locked: {folder.lock_problem}. Two runs in it would overwrite each "
            "other's files"
        )
    with ExitStack() as at_the_end:
        at_the_end.callback(folder.leave)
        trainer = build_trainer(recipe, path, world, stop, progress)
        at_the_end.callback(trainer.close)
        at_the_end.callback(progress.end)
        try:
            trainer.restore_latest()
            if world.is_main:  # nothing is written before all is known to be well
                folder.clear()
                write_text_atomically(path / "config.yaml", dump(trainer.resolved_recipe()))
            trainer.begin()
            return trainer.run()
        except OSError as error:
            problem = write_problem(error, path)
            where = f"{error.filename}: " if error.filename else ""
            raise DataError(f"{where}{problem}") from error
