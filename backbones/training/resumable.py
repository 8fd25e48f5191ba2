"""The state of a run: set up, saved in ``last.pt``, resumed, and recovered from a bad loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, random_seed
from torch import nn

from backbones.common.checkpoint_files import CheckpointError, read_file
from backbones.common.errors import CREATION_ERRORS, FileError, MendableError, RecipeError
from backbones.common.files import write_atomically
from backbones.common.generators import get_rng_state, set_rng_state
from backbones.common.keys import fields_of
from backbones.common.messages import joined_lines
from backbones.common.processes import Consensus, World
from backbones.common.progress import Progress
from backbones.common.signals import StopRequest
from backbones.training import build, optimization, parallel
from backbones.training.distillation import StudentWithExits
from backbones.training.optimization import images_per_update, learning_rate
from backbones.training.recipe import Recipe, check_learning_rate, differences
from backbones.training.record import RunLog

PREVIOUS, VALIDATED = "last.prev.pt", "last.validated.pt"  # beside last.pt, hard links at first
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

    count_of_sums: int  # see ``sums``

    def __init__(
        self, recipe: Recipe, folder: Path, world: World, stop: StopRequest, progress: Progress
    ) -> None:
        self.recipe, self.folder, self.world, self.progress = recipe, folder, world, progress
        self.stop, self.device = stop, world.device
        self.epoch = self.step = self.updates = self.skipped = 0
        self.seconds = self.waited = 0.0
        self.best = -math.inf
        self.history: list[dict[str, Any]] = []  # a row for each finished epoch
        # Epoch and step of the latest consecutive updates with a non-finite loss.
        self.bad_steps: list[tuple[int, int]] = []
        self.saved_at: int | None = None  # updates in last.pt, if this process wrote it
        self.resumed_from: Path | None = None
        self._validated = False
        random_seed(recipe.seed)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Build data and model, and call :meth:`set_up` with the latter."""

    def set_up(
        self, model: nn.Module, updates_per_epoch: int, network: nn.Module | None = None
    ) -> None:
        """Optimizer, schedule, average and everything else around the network.

        ``network`` is ``model``, wrapped with parts needed only in training.
        """
        recipe, world = self.recipe, self.world
        self.model, self.updates_per_epoch = model, updates_per_epoch
        self.network = model if network is None else network
        if recipe.sync_bn and world.size > 1:
            if self.device.type == "cpu":
                raise RecipeError("sync_bn needs GPUs: torch does not have it for CPUs")
            convert_sync_batchnorm(self.network)
        self.guard = build.RunningStatsGuard(self.network)
        self.ema: Any = None
        if recipe.ema:
            # Shared-out weights and whole buffers do not go into one foreach call.
            options = {"use_warmup": recipe.ema_warmup, "foreach": not recipe.fsdp}
            self.ema = ModelEmaV3(model, recipe.ema_decay, **options)
        if recipe.compile:
            self.network.compile()
        if recipe.fsdp:
            self.net = parallel.shard(self.network, world)
            if self.ema is not None:
                parallel.shard(self.ema.module, world)
        else:
            self.net = parallel.replicate(self.network, world)
        self.lr = learning_rate(recipe, world.size)
        check_learning_rate(recipe, self.lr)
        self.optimizer = optimization.build_optimizer(recipe, self.network, self.lr)
        self.scheduler, self.epochs = optimization.build_scheduler(
            recipe, self.optimizer, updates_per_epoch
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.consensus = Consensus(world)

        # What the batches of the epoch so far add up to.
        self.sums = torch.zeros(self.count_of_sums, dtype=torch.float64, device=self.device)
        self.log = RunLog(self.folder, recipe, world.is_main)
        self.begun = self.saved = time.monotonic()
        self.done_before = 0  # updates of earlier processes of this run
        random_seed(recipe.seed, world.rank)

    def parts(self) -> dict[str, Any]:
        """All objects with a ``state_dict``, by name in the checkpoint.

        timm's schedules are functions of the number of updates, except ``plateau``.
        """
        parts: dict[str, Any] = {"model": self.model}
        parts |= {"optimizer": self.optimizer, "scaler": self.scaler}
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
        previous, validated = last.with_name(PREVIOUS), last.with_name(VALIDATED)
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
            paths = [path for path in (last, last.with_name(PREVIOUS)) if path.exists()]
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


def save_state(path: Path, state: dict[str, Any], validated: bool = False) -> None:
    """Save ``state`` (tensors and plain Python values) as ``path``, the old file as ``PREVIOUS``.

    If ``validated``, it also becomes ``VALIDATED``, where hard links are supported.
    """

    def write(file: IO[bytes]) -> None:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():  # only now that the new file is complete
            try:
                _link(path, path.with_name(PREVIOUS))
            except OSError:  # a file system without hard links
                os.replace(path, path.with_name(PREVIOUS))

    write_atomically(path, write)
    if validated:
        with contextlib.suppress(OSError):
            _link(path, path.with_name(VALIDATED))


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
