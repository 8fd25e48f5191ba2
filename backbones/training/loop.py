"""The training loop: updates that can be skipped, validation, signals."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad, random_seed
from torch import Tensor, nn

from backbones.common.errors import BUILDING_ERRORS, RecipeError
from backbones.common.files import save_weights, write_text_atomically
from backbones.common.memory import peak_memory
from backbones.common.messages import first_line
from backbones.common.progress import duration
from backbones.training import optimization, parallel
from backbones.training.recipe import Recipe
from backbones.training.record import means_of, say_results
from backbones.training.resumable import DivergedError, Resumable


class TrainingLoop(Resumable):
    """The loop of a run; subclasses implement the task.

    A step calls ``net``, the network or its DDP wrapper.
    """

    score_key: str  # the validation metric that selects the best weights; higher is better
    factors: ClassVar[Mapping[str, float]]  # of the means of an epoch's sums, see :func:`means_of`
    texts: ClassVar[Mapping[str, str]]  # formats of an epoch's figures, by column of summary.csv
    train_loader: Any  # has ``epoch``, ``names`` and ``close`` like :class:`TrainLoader`
    facts: Mapping[str, str] = {}  # metadata of the best weights, besides model and epoch

    def dry_run(self, batch: Any) -> None:
        """Compute the loss of a batch, to detect networks that don't support the image size."""
        self.net.train()
        self.guard.keep()
        try:
            with torch.no_grad(), self.autocast():
                self.compute(batch)
        except BUILDING_ERRORS as error:
            raise RecipeError(
                f"{self.recipe.model} cannot be trained with batches of {tuple(batch[0].shape)} "
                f": {first_line(error)}"
            ) from error
        finally:
            self.guard.restore()
            random_seed(self.recipe.seed, self.world.rank)

    # --- implemented by subclasses

    @abstractmethod
    def compute(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of a batch, computed by ``net``, and what it adds to the epoch's sums."""

    @abstractmethod
    def validate(self, model: nn.Module) -> tuple[dict[str, float], int]:
        """Metrics over all validation images, and the signal received meanwhile, or 0."""

    @abstractmethod
    def show_results(self) -> None:
        """Draw the pictures of a finished run and report its best metric."""

    def resolved_recipe(self) -> Recipe:
        """The resolved recipe to save with the results."""
        return self.recipe

    def begin(self) -> None:
        """Open the logs at the position where the run continues."""
        self.log.open()
        if self.resumed_from is not None:
            self.log.rewind(self.updates, self.history)

    def close(self) -> None:
        """End the loader processes and the logs."""
        self.train_loader.close()
        self.log.close()

    # --- the loop

    def run(self) -> int:
        """Train to the end; 0, or 128 + the number of the signal that stopped it."""
        self.begun, self.done_before = time.monotonic(), self.updates
        while self.epoch < self.epochs:
            signal = self.train_epoch() or self.finish_epoch()
            if signal:
                self.progress.end()
                last = self.folder / "last.pt"
                saved = f"saved in {last}"
                if self.saved_at != self.updates:
                    saved = f"not saved: the loss is not finite; {last}, if present, is older"
                self.progress.say(
                    f"stopped by signal {signal} after {self.updates} updates, {saved}; "
                    "--resume auto continues"
                )
                return 128 + signal
        self.progress.end()
        if self.world.is_main:
            self.show_results()
            say_results(self.progress, self.folder)
        return 0

    def train_epoch(self) -> int:
        """Train from ``step`` to the end of the epoch; returns the received signal, or 0."""
        self.net.train()
        self.progress.begin(self.title(self.epoch), self.updates_per_epoch, self.step)
        batches = self.train_loader.epoch(self.epoch, self.step * self.recipe.accum_steps)
        while self.step < self.updates_per_epoch:
            started = time.monotonic()
            bad, signal, save = self.update(batches)
            self.seconds += time.monotonic() - started
            self.step += 1
            self.updates += 1
            if self.scheduler is not None:
                self.scheduler.step_update(self.updates)
            self.skipped += bad
            self.bad_steps = [*self.bad_steps, (self.epoch, self.step - 1)] if bad else []
            if len(self.bad_steps) == self.recipe.max_bad_steps:
                self.stop_diverged()
            if self.updates % self.recipe.log_every == 0:
                figures = {**means_of(self.sums, self.factors), **self.figures()}
                self.log.add({"epoch": self.epoch, "update": self.updates, **figures})
            if self.progress.due():
                row = {**means_of(self.sums, self.factors, "train_"), **self.figures()}
                self.progress.show(self.step, self.describe(row))
            if save or signal:
                self.save()
            if signal:
                return signal
        return 0

    def update(self, batches: Iterator[Any]) -> tuple[bool, int, bool]:
        """One update of ``accum_steps`` batches: whether skipped, signal, whether to save."""
        accum, bad, signal, save = self.recipe.accum_steps, False, 0, False
        self.guard.keep()
        for micro in range(accum):
            waiting = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - waiting
            with parallel.synchronized_gradients(self.net, last=micro == accum - 1):
                with self.autocast():
                    loss, sums = self.compute(batch)
                self.consensus.send(loss, self.stop.signal, self.is_save_due())
                self.scaler.scale(loss / accum).backward()
            bad_now, signal_now, save_now = self.consensus.read()
            bad, signal, save = bad or bad_now, max(signal, signal_now), save or save_now
            if not bad_now:
                self.sums += sums
        if bad:
            self.guard.restore()
        else:
            self.apply_gradients()
        self.optimizer.zero_grad(set_to_none=True)
        return bad, signal, save

    def apply_gradients(self) -> None:
        """Clip, step, average."""
        recipe = self.recipe
        if recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = model_parameters(self.network, exclude_head=recipe.clip_mode == "agc")
            dispatch_clip_grad(parameters, recipe.clip_grad, mode=recipe.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates + 1)

    def finish_epoch(self) -> int:
        """Validate, record, keep the best, save; returns the signal received meanwhile, or 0."""
        row: dict[str, Any] = {"epoch": self.epoch, "update": self.updates}
        row |= means_of(self.world.sum(self.sums.clone()), self.factors, "train_")
        score = None
        if (self.epoch + 1) % self.recipe.eval_every == 0 or self.epoch + 1 == self.epochs:
            for name, model in self.models().items():
                figures, signal = self.validate(model)
                if signal:  # the checkpoint says "epoch trained"; a resumed run validates it
                    self.save()
                    return signal
                self.check_figures(figures, model)
                row |= {f"{name}_{key}": value for key, value in figures.items()}
                score = figures[self.score_key]  # that of the average, if there is one
        row |= self.figures()
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        if self.recipe.sched == "plateau" and score is not None:
            self.scheduler.step(self.epoch, score)
        if score is not None and score > self.best:
            self.best = score
            metadata = {"model": self.recipe.model, "epoch": str(self.epoch), **self.facts}
            weights = parallel.full_state(dict(list(self.models().values())[-1].state_dict()))
            if self.world.is_main:
                save_weights(self.folder / "best.safetensors", weights, metadata)
        self.sums, self.seconds, self.waited = torch.zeros_like(self.sums), 0.0, 0.0
        self.save(validated=score is not None)
        self.log.add(row)
        self.log.summarize(self.history)
        self.progress.end()
        self.progress.say(f"{self.title(row['epoch'])}  {self.describe(row)}")
        return 0

    # --- parts of the loop

    def models(self) -> dict[str, nn.Module]:
        """The networks to validate; the last one determines the best weights."""
        return {"val": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def autocast(self) -> Any:
        """Autocast, if the recipe uses mixed precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.amp or "")
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def stop_diverged(self) -> NoReturn:
        """Stop after too many bad updates in a row; ``last.pt`` has weights from before them."""
        names = [name for place in self.bad_steps for name in self.train_loader.names(*place)]
        images: list[str] = sum(self.world.gather(names), [])
        left = self.roll_back(since=self.updates - len(self.bad_steps))
        path = self.folder / "bad_batches.txt"
        if self.world.is_main:
            write_text_atomically(path, "".join(f"{name}\n" for name in images))
        raise DivergedError(
            f"the loss was not finite in {len(self.bad_steps)} updates in a row; their "
            f"{len(images)} images ({', '.join(images[:3])}, …) are listed in {path}; {left}. A "
            "lower lr or clip_grad may help"
        )

    def check_figures(self, figures: dict[str, float], model: nn.Module) -> None:
        """Stop without saving if a validation shows that the weights have diverged."""
        wrong = [
            f"{key} {value}"
            for key, value in figures.items()
            if math.isnan(value) or (key == "loss" and math.isinf(value))
        ]
        if not parallel.is_bounded(model, self.world):
            wrong.append("weights that are not finite or beyond 1e12")
        if wrong:
            left = self.roll_back(since=self.updates)
            raise DivergedError(
                f"the validation after {self.updates} updates found {', '.join(wrong)}; {left}. A "
                "lower lr or clip_grad may help"
            )

    def stop_signal(self) -> int:
        """The signal that any process has received, or 0; a collective call."""
        return int(self.world.max(torch.tensor(self.stop.signal, device=self.device)))

    def is_save_due(self) -> bool:
        """Whether the checkpoint within the epoch is due after this update."""
        steps, minutes = self.recipe.save_every_steps, self.recipe.save_every_minutes
        by_clock = minutes > 0 and time.monotonic() - self.saved > 60 * minutes
        return (steps > 0 and (self.updates + 1) % steps == 0) or by_clock

    # --- reporting

    def title(self, epoch: int) -> str:
        """The number of an epoch, counted from 1."""
        return f"epoch {epoch + 1:{len(str(self.epochs))}}/{self.epochs}"

    def figures(self) -> dict[str, float]:
        """This process's rate, speed and problems in the epoch so far."""
        images = self.step * optimization.images_per_update(self.recipe, self.world.size)
        return {
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": images / max(self.seconds, 1e-9),
            "data_wait": self.waited / max(self.seconds, 1e-9),
            "memory_mb": peak_memory(self.device),
            "seconds": self.seconds,
            "skipped": self.skipped,
        }

    def seconds_left(self) -> float:
        """Estimate for the whole run, from the speed of this process so far."""
        left = self.epochs * self.updates_per_epoch - self.updates
        pace = (time.monotonic() - self.begun) / max(self.updates - self.done_before, 1)
        return left * pace

    def describe(self, row: dict[str, Any]) -> str:
        """An epoch's figures as text: metrics, problems and the time left."""
        parts = [text.format(row[key]) for key, text in self.texts.items() if key in row]
        parts.append(f"{row['memory_mb'] / 1024:.1f} GiB")
        if row["data_wait"] > 0.1:
            parts.append(f"{100 * row['data_wait']:.0f} % waiting for data")
        if row["skipped"]:
            parts.append(f"{row['skipped']} updates skipped")
        return "  ".join([*parts, f"{duration(self.seconds_left())} left"])
