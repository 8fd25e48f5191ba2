"""Saving and resuming runs: the contents of ``last.pt``, checks, and recovery from a bad loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from abc import ABC
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from backbones.common.checkpoint_files import CheckpointError, read_file
from backbones.common.errors import CREATION_ERRORS, FileError, MendableError
from backbones.common.files import write_atomically
from backbones.common.generators import get_rng_state, set_rng_state
from backbones.common.keys import fields_of
from backbones.common.messages import joined_lines
from backbones.common.processes import World
from backbones.common.progress import Progress
from backbones.training import parallel
from backbones.training.distillation import StudentWithExits
from backbones.training.optimization import images_per_update, learning_rate
from backbones.training.recipe import Recipe, differences

_FORMAT = 1  # of last.pt; files without one are of this format
_COUNTERS = ("epoch", "step", "updates", "skipped", "history", "best", "seconds", "waited")
# Keys that the optimizer's groups hold, without "opt_".
_SETTINGS = ("weight_decay", "momentum", "opt_betas", "opt_eps")
# The plateau scheduler's own state; the rest comes from the recipe.
_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class DivergedError(MendableError, RuntimeError):
    """Loss or weights are not finite: too many times in a row, or in a validation."""


class Resumable(ABC):
    """A run that can be saved and resumed bit for bit.

    Its position is ``epoch`` and ``step``, an update within it; ``updates`` count from the start.
    """

    model: nn.Module
    network: nn.Module  # with parts that only training needs, such as exits for distillation
    ema: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    sums: torch.Tensor  # of the epoch so far
    lr: float
    updates_per_epoch: int

    def __init__(self, recipe: Recipe, folder: Path, world: World, progress: Progress) -> None:
        self.recipe, self.folder, self.world, self.progress = recipe, folder, world, progress
        self.epoch = self.step = self.updates = self.skipped = 0
        self.seconds = self.waited = 0.0
        self.best = -math.inf
        self.history: list[dict[str, Any]] = []  # a row for each finished epoch
        # Epoch and step of the latest consecutive updates with a non-finite loss.
        self.bad_steps: list[tuple[int, int]] = []
        self.saved_at: int | None = None  # updates in last.pt, if this process wrote it
        self.resumed_from: Path | None = None
        self._validated = False

    def parts(self) -> dict[str, Any]:
        """All objects with a ``state_dict``, by name in the checkpoint.

        timm's schedules are functions of the number of updates, except ``plateau``.
        """
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        parts["scaler"] = self.scaler
        if self.recipe.sched == "plateau":
            parts["plateau"] = self.scheduler.lr_scheduler
        if self.ema is not None:
            parts["model_ema"] = self.ema.module
        if isinstance(self.network, StudentWithExits):
            parts["exits"] = self.network.exits
        return parts

    # --- saving

    def save(self, validated: bool = False) -> None:
        """Write ``last.pt``, unless the weights, if not just ``validated``, may have diverged."""
        mine = {"rng": get_rng_state(), "meter": self.sums.cpu()}
        ranks = self.world.gather(mine)
        self.saved = time.monotonic()
        if self.bad_steps and not validated:
            return
        if not parallel.is_bounded(self.network, self.world):
            return
        self.saved_at, self._validated = self.updates, validated
        if not (self.world.is_main or self.recipe.fsdp):  # shares are collected from everyone
            return
        state = {name: getattr(self, name) for name in _COUNTERS}
        state |= {
            name: parallel.full_state(part.state_dict()) for name, part in self.parts().items()
        }
        recipe = dataclasses.asdict(self.recipe)
        state |= {"ranks": ranks, "recipe": recipe, "format": _FORMAT}
        if self.world.is_main:
            save_state(self.folder / "last.pt", state, validated)

    def roll_back(self, since: int) -> str:
        """Restore ``last.pt`` to a state before divergence; the current one is ``diverged.pt``.

        This is the last validated state, if any, since a training loss may stay finite while
        weights grow without bound; otherwise, a state that was followed by a finite loss.
        Checkpoints from before this process are not changed. Returns a description of the remaining
        ones. Nothing was finite ``since`` that number of updates.
        """
        last = self.folder / "last.pt"
        previous, validated = previous_path(last), validated_path(last)
        if self.saved_at is None and self.resumed_from is not None:
            return f"it was resumed from {self.resumed_from}, which is unchanged"
        if self.world.is_main and self.saved_at is not None and not self._validated:
            if validated.exists():
                os.replace(last, self.folder / "diverged.pt")
                os.replace(validated, last)
                previous.unlink(missing_ok=True)
            elif self.saved_at == since:
                os.replace(last, self.folder / "diverged.pt")
                if previous.exists():
                    os.replace(previous, last)
        self.world.wait()
        return f"{last} has weights from before" if last.exists() else "none were saved before"

    # --- resuming

    def restore_latest(self) -> None:
        """Resume from the latest intact checkpoint or the one given by ``recipe.resume``."""
        if self.recipe.resume is None:
            return
        paths = [Path(self.recipe.resume)]
        if self.recipe.resume == "auto":
            last = self.folder / "last.pt"
            paths = [path for path in (last, previous_path(last)) if path.exists()]
        problems: list[str] = []
        for path in paths:
            try:
                state = load_state(path)
            except FileError as error:
                problems.append(str(error))
                continue
            if problems:
                self.progress.say(f"{problems[0]}; falling back to {path}")
            return self.resume(state, path)
        if problems:
            raise FileError("; ".join(problems))

    def resume(self, state: dict[str, Any], path: Path) -> None:
        """Continue from ``state``, bit for bit with the same number of processes.

        The recipe's learning rate, schedule, weight decay and similar settings apply from here on,
        even if changed.
        """
        missing = [key for key in ("optimizer", "ranks", "recipe", *_COUNTERS) if key not in state]
        if missing:
            raise FileError(f"{path} has no training state (no {missing[0]!r} in it)")
        try:
            known = fields_of(type(self.recipe))
            earlier = type(self.recipe)(**{k: v for k, v in state["recipe"].items() if k in known})
            if earlier.opt != self.recipe.opt:
                raise ValueError("another optimizer")
            self._load_parts(state, earlier)
            ranks, mine = state["ranks"], self.world.rank
            if len(ranks) == self.world.size:
                set_rng_state(ranks[mine]["rng"])
                self.sums.copy_(ranks[mine]["meter"])
            elif self.world.is_main:
                self.sums.copy_(sum(rank["meter"] for rank in ranks))
            before = images_per_update(earlier, len(ranks))
        except CREATION_ERRORS as error:
            known = state["recipe"] if isinstance(state["recipe"], dict) else {}
            why = "; ".join([*differences(self.recipe, known), joined_lines(error, 300)])
            raise FileError(f"{path} does not fit this recipe: {why}") from error
        if not parallel.is_bounded(self.network, self.world):
            raise FileError(f"{path} has weights that are not finite or beyond 1e12: it diverged")
        now = images_per_update(self.recipe, self.world.size)
        if before != now:  # go on with the image where it stopped, as nearly as batches allow
            self.step = min(self.step * before // now, self.updates_per_epoch)
            self.updates = self.epoch * self.updates_per_epoch + self.step
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        self.resumed_from = path
        self.progress.say(f"resuming from {path}: epoch {self.epoch + 1}, update {self.updates}")
        for line in differences(self.recipe, state["recipe"]):
            self.progress.say(f"  changed since: {line}")

    def _load_parts(self, state: dict[str, Any], earlier: Recipe) -> None:
        fresh = [dict(group) for group in self.optimizer.param_groups]
        for name, part in self.parts().items():
            values = state[name]
            if name == "plateau":
                values = {key: values[key] for key in _PLATEAU}
            if name == "scaler" and not values:
                continue  # it was without fp16
            parallel.load_state(part, values)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        changed = [
            key.removeprefix("opt_")
            for key in _SETTINGS
            if getattr(earlier, key) != getattr(self.recipe, key)
        ]
        now, before = self.recipe.opt_args, earlier.opt_args
        changed += [key for key in now | before if now.get(key) != before.get(key)]
        # A plateau schedule has lowered the rate; all other rates follow from the recipe.
        if self.recipe.sched != "plateau" or self.lr != learning_rate(earlier, len(state["ranks"])):
            changed += ["lr", "initial_lr"]
        for group, new in zip(self.optimizer.param_groups, fresh, strict=True):
            group |= {k: v for k, v in new.items() if k in changed or k not in group}


# --- files


def previous_path(path: Path) -> Path:
    """The path of the previous checkpoint: ``last.pt`` → ``last.prev.pt``."""
    return path.with_suffix(f".prev{path.suffix}")


def validated_path(path: Path) -> Path:
    """``last.validated.pt``, which passed validation: a hard link to ``path`` at first."""
    return path.with_suffix(f".validated{path.suffix}")


def save_state(path: Path, state: dict[str, Any], validated: bool = False) -> None:
    """Save ``state`` (tensors and plain Python values) as ``path``, the old file as ``.prev``.

    If ``validated``, it also becomes :func:`validated_path`, where hard links are supported.
    """

    def write(file: IO[bytes]) -> None:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():  # only now that the new file is complete
            try:
                _link(path, previous_path(path))
            except OSError:  # a file system without hard links
                os.replace(path, previous_path(path))

    write_atomically(path, write)
    if validated:
        with contextlib.suppress(OSError):
            _link(path, validated_path(path))


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_state` onto the CPU, after verifying its checksums."""
    try:
        state = read_file(path)
    except FileNotFoundError:
        raise FileError(f"there is no checkpoint {path}") from None
    except (CheckpointError, OSError) as error:
        raise FileError(str(error)) from error
    if not isinstance(state, dict) or "model" not in state:
        raise FileError(f"{path} has no training state (no 'model' in it)")
    if state.get("format", _FORMAT) != _FORMAT:
        raise FileError(
            f"{path} has format {state['format']}, this version reads {_FORMAT}: resume with the "
            "version that wrote it, or a newer one"
        )
    return state


def _link(path: Path, other: Path) -> None:
    """Hard-link the file, so that ``path`` exists at every moment."""
    link = other.with_name(f".{other.name}.tmp")
    link.unlink(missing_ok=True)
    os.link(path, link)
    os.replace(link, other)
    link.unlink(missing_ok=True)  # which stays where both were the same file already
