"""From a command line to a finished run: what all training scripts do around their trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from backbones._checkpoint import CheckpointError
from backbones.training.checkpoint import write_atomically
from backbones.training.command_line import parse_command_line
from backbones.training.distributed import World, world_of_processes
from backbones.training.errors import TrainingError
from backbones.training.folder import choose_folder
from backbones.training.interrupt import StopRequest, stop_on_signals
from backbones.training.loop import TrainingLoop
from backbones.training.progress import Progress
from backbones.training.recipe import AnyRecipe, dump_recipe

__all__ = ["run_from_command_line"]


def run_from_command_line(
    build_trainer: Callable[[AnyRecipe, Path, World, StopRequest, Progress], TrainingLoop],
    recipe_class: type[AnyRecipe],
    argv: Sequence[str] | None = None,
    description: str = "",
) -> int:
    """Read the recipe, build the trainer, take up an earlier state if wanted, and train.

    What a user can mend goes to standard error without a traceback.

    Args:
        build_trainer: a :class:`TrainingLoop`'s class.
        recipe_class: the kind of recipe that it takes.
        argv: the command line; None for this process's.
        description: what ``--help`` begins with.

    Returns:
        The exit status: 0, 1 after an error, 128 + the signal that stopped the run.
    """
    try:
        recipe, options = parse_command_line(argv, description, recipe_class)
        if options.print_config:
            sys.stdout.write(dump_recipe(recipe))
            return 0
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        with stop_on_signals() as stop, world_of_processes(recipe.device) as world:
            folder = world.gather(choose_folder(recipe, options) if world.is_main else None)[0]
            progress = Progress(world)
            trainer = build_trainer(recipe, folder, world, stop, progress)
            try:
                if world.is_main:
                    text = dump_recipe(trainer.resolved_recipe()).encode()
                    write_atomically(folder / "config.yaml", lambda file: file.write(text))
                trainer.take_up()
                return trainer.run()
            finally:
                progress.end()
                trainer.close()
    except (TrainingError, CheckpointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
