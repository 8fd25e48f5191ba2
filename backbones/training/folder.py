"""The folder of a run, whose existing files are never replaced unless requested."""

from __future__ import annotations

import contextlib
import itertools
from argparse import Namespace
from pathlib import Path

from backbones.common.errors import RecipeError
from backbones.common.lock import FolderLock, LockedError
from backbones.common.messages import joined_lines
from backbones.common.outputs import overwritten
from backbones.common.processes import World
from backbones.training.recipe import Recipe
from backbones.training.record import RESULTS
from backbones.training.resumable import PREVIOUS, VALIDATED

_FILES = (*RESULTS, PREVIOUS, VALIDATED, "diverged.pt")
_EVENTS = "events.out.tfevents."
_RECIPE, _FIRST_LINE = "config.yaml", b"# --- model"


class RunFolder:
    """``output/name``, created if necessary, and locked until :meth:`leave`.

    The main process does both for all processes, and all raise its :class:`RecipeError`.
    The default name is the config's, plus the model's if given on the command line, and a number if
    another run has that name. ``resume: auto`` selects the latest of these. ``lock_problem`` is why
    it could not be locked, if so.
    """

    def __init__(self, recipe: Recipe, options: Namespace, world: World) -> None:
        self._resumes = recipe.resume == "auto"
        self._replaces = recipe.overwrite and not self._resumes
        self._lock: FolderLock | None = None
        self._is_new = False
        self.path, self.lock_problem, problem = Path(recipe.output), "", ""
        try:
            if world.is_main:
                self._choose(recipe, options)
                self._check(recipe)
        except LockedError as error:
            problem = f"{self.path} is in use by {error}: wait for it, or choose another --name"
        except OSError as error:
            reason = error.strerror or joined_lines(error)
            problem = f"cannot use the folder {self.path}: {reason}"
        except RecipeError as error:
            problem = str(error)
        self.path, problem = world.gather((self.path, problem))[0]
        if problem:
            self.leave()
            raise RecipeError(problem)

    def _choose(self, recipe: Recipe, options: Namespace) -> None:
        output = self.path
        if recipe.name is not None:
            self._lock_folder(output / recipe.name)
            return
        parts = [Path(options.config).stem] if options.config else []
        base = "-".join(parts + [recipe.model] * (not parts or "model" in options))
        names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        if self._resumes:
            earlier = itertools.takewhile(_used, (output / name for name in names))
            self._lock_folder([output / base, *earlier][-1])
        elif self._replaces:
            self._lock_folder(output / base)
        while self._lock is None:
            if not _used(path := output / next(names)):
                with contextlib.suppress(LockedError):  # another run has just begun in it
                    self._lock_folder(path)

    def _lock_folder(self, path: Path) -> None:
        self.path, self._is_new = path, not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(path)
        self.lock_problem = self._lock.problem

    def _check(self, recipe: Recipe) -> None:
        used, described = _used(self.path), self.path / _RECIPE
        if used and not (self._resumes or self._replaces):
            raise RecipeError(
                f"{self.path} contains an earlier run: continue with --resume auto, choose another "
                "--name, or replace it with --overwrite"
            )
        foreign = used and self._replaces
        if described.exists():
            with open(described, "rb") as file:
                foreign = file.readline().rstrip() != _FIRST_LINE
        if foreign:
            raise RecipeError(
                f"{self.path} contains another program's files, which would be replaced; nothing "
                "was changed. Choose another --name"
            )
        read = (recipe.checkpoint, recipe.teacher_checkpoint, recipe.class_map)
        if (found := overwritten([self.path / name for name in _FILES], read)) is not None:
            raise RecipeError(
                f"the run would overwrite {found[1]}, which it reads: choose another --name"
            )

    def clear(self) -> None:
        """With ``overwrite``, delete the earlier run's files; other files and folders are kept.

        For the main process.
        """
        if not self._replaces:
            return
        names = {*_FILES, *(f".{name}.tmp" for name in _FILES)}
        for path in self.path.iterdir():
            if path.is_file() and (path.name in names or path.name.startswith(_EVENTS)):
                path.unlink()

    def leave(self) -> None:
        """Unlock the folder, and remove it if it is new and empty."""
        if self._lock is not None:
            self._lock.release()
        if self._is_new:
            with contextlib.suppress(OSError):
                self.path.rmdir()


def _used(folder: Path) -> bool:
    """Whether there are results: a run that failed at once has left lists or its recipe at most."""
    results = (name for name in _FILES if not name.endswith((".txt", ".yaml")))
    return any((folder / name).exists() for name in results)
