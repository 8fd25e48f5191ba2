"""Where a run puts its files: a folder of its own, and never over an earlier run unasked."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from backbones.training.errors import RecipeError
from backbones.training.recipe import Recipe

__all__ = ["choose_folder"]

_MARKS = ("last.pt", "last.prev.pt", "metrics.jsonl", "summary.csv")


def choose_folder(recipe: Recipe, options: Namespace) -> Path:
    """Make and return ``output/name``.

    Without a name it is that of the config, and of the model if the command line chose it; where
    that is taken by an earlier run, a number follows. ``resume: auto`` takes the last of them.

    Args:
        recipe: ``output``, ``name``, ``resume``, ``overwrite``, ``model``.
        options: the command line, from :func:`parse_command_line`.

    Raises:
        RecipeError: the named run exists already, or the folder cannot be made.
    """
    output, resumes = Path(recipe.output), recipe.resume == "auto"
    if recipe.name:
        folder = output / recipe.name
        if _used(folder) and not resumes and not recipe.overwrite:
            raise RecipeError(
                f"{folder} holds an earlier run: go on with --resume auto, choose another --name, "
                "or replace it with --overwrite"
            )
    else:
        parts = [Path(options.config).stem] if options.config else []
        base = "-".join(parts + [recipe.model] * (not parts or "model" in options))
        folder, number = output / base, 1
        while _used(folder) and not recipe.overwrite:
            number += 1
            following = output / f"{base}-{number}"
            if resumes and not _used(following):
                break
            folder = following
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if recipe.overwrite and not resumes:
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
    except OSError as error:
        raise RecipeError(f"cannot make {folder}: {error.strerror}") from error
    return folder


def _used(folder: Path) -> bool:
    return any((folder / name).exists() for name in _MARKS)
