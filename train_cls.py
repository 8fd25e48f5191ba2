"""Train a classifier: recipe → model → data → loop.

    python train_cls.py --config configs/cls/quickstart.yaml
    python train_cls.py --config configs/cls/van.yaml --model van_b2 --data /path/to/imagenet
    torchrun --nproc-per-node 8 train_cls.py --config …

Any key of the recipe is a flag; ``--help`` lists them and ``--print-config`` shows what is
resolved. Results go to ``OUTPUT/NAME/``: ``best.safetensors``, ``last.pt`` (everything needed to
go on, weights under ``model``), ``summary.csv``, ``metrics.jsonl``, ``curves.png``,
``predictions.png``, ``config.yaml``. ``--resume auto`` goes on after a crash or a signal.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import backbones
from backbones.training import build, checkpoint, pictures
from backbones.training.bad_steps import BadSteps
from backbones.training.command_line import parse_command_line
from backbones.training.corrupt import CorruptImages
from backbones.training.data import open_splits
from backbones.training.distributed import Verdict, World, world_of_processes
from backbones.training.errors import CheckpointFileError, TrainingError
from backbones.training.folder import choose_folder
from backbones.training.interrupt import StopRequest, stop_on_signals
from backbones.training.loader import TrainLoader, ValidationLoader
from backbones.training.progress import (
    Meter,
    Progress,
    RunLog,
    describe_epoch,
    duration,
    peak_memory,
)
from backbones.training.recipe import Recipe, differences, dump_recipe

COUNTERS = ("epoch", "step", "updates", "skipped", "history", "best", "seconds", "waited")


class Trainer:
    """All that a run consists of, and the loop over it.

    Attributes:
        model: the bare network; ``net`` is what the loop calls, the same or its DDP wrapper.
        epoch, step, updates: the position: updates within the epoch, and since the beginning.
        history: a row for each finished epoch.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, world: World, stop: StopRequest, progress: Progress
    ) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.stop, self.progress = stop, progress
        self.device = world.device
        self.amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.amp or "")
        random_seed(recipe.seed)

        splits = open_splits(recipe)
        self.classes = splits.classes
        self.num_classes = recipe.num_classes or len(splits.classes)
        self.model = build.build_model(recipe, self.num_classes).to(self.device)
        self.config = build.preprocessing(recipe, self.model)

        self.corrupt = [
            CorruptImages(folder / f"corrupt_{split}.txt", recipe.max_corrupt)
            for split in ("train", "validation")
        ]
        self.train_loader = TrainLoader(
            splits.train, splits.train_size, self.config, recipe, world, self.corrupt[0]
        )
        self.val_loader = ValidationLoader(
            splits.validation, splits.validation_size, self.config, recipe, world, self.corrupt[1]
        )
        self.updates_per_epoch = self.train_loader.batches // recipe.accum_steps

        if recipe.sync_bn and world.size > 1:
            self.model = convert_sync_batchnorm(self.model)
        self.lr = build.learning_rate(recipe, world.size)
        self.optimizer = build.build_optimizer(recipe, self.model, self.lr)
        self.scheduler, self.epochs = build.build_scheduler(
            recipe, self.optimizer, self.updates_per_epoch
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.ema = None
        if recipe.ema:
            self.ema = ModelEmaV3(self.model, recipe.ema_decay, use_warmup=recipe.ema_warmup)
        self.loss = build.build_loss(recipe)
        self.augment = build.BatchAugmentation(recipe, self.num_classes, self.device)
        self.guard = build.RunningStatsGuard(self.model)
        self.verdict = Verdict(world)
        if recipe.compile:
            self.model.compile()
        self.net: nn.Module = self.model
        if world.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=ids)

        self.epoch = self.step = self.updates = self.skipped = 0
        self.bad_steps = BadSteps(recipe.max_bad_steps)
        self.history: list[dict[str, Any]] = []
        self.best = -math.inf
        self.seconds = self.waited = 0.0
        self.meter = Meter(self.device)
        self.log = RunLog(folder, recipe, world.is_main)
        self.begun = self.saved = time.monotonic()
        self.done_before = 0  # updates of earlier processes of this run
        random_seed(recipe.seed, world.rank)

    # --- the loop

    def run(self) -> int:
        """Train to the end; 0, or 128 + the number of the signal that stopped it."""
        self.begun, self.done_before = time.monotonic(), self.updates
        while self.epoch < self.epochs:
            signal = self.train_epoch() or self.finish_epoch()
            if signal:
                self.progress.end()
                self.progress.say(
                    f"stopped by signal {signal} after {self.updates} updates, saved in "
                    f"{self.folder / 'last.pt'}; --resume auto goes on"
                )
                return 128 + signal
        self.progress.end()
        self.show_results()
        return 0

    def train_epoch(self) -> int:
        """Train from ``step`` to the end of the epoch; the signal that came, or 0."""
        self.net.train()
        title = f"epoch {self.epoch + 1:{len(str(self.epochs))}}/{self.epochs}"
        self.progress.begin(title, self.updates_per_epoch, self.step)
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
            if self.bad_steps.note(bad, self.epoch, self.step - 1):
                self.give_up()
            if self.updates % self.recipe.log_every == 0:
                self.log.add({"epoch": self.epoch, "update": self.updates, **self.figures()})
            if self.progress.due():
                self.progress.show(self.step, self.describe())
            if save or signal:
                self.save()
            if signal:
                return signal
        return 0

    def update(self, batches: Iterator[Any]) -> tuple[bool, int, bool]:
        """One update from ``accum_steps`` batches: was it skipped, the signal, shall we save."""
        accum, bad, signal, save = self.recipe.accum_steps, False, 0, False
        self.guard.keep()
        for micro in range(accum):
            waiting = time.monotonic()
            images, labels = next(batches)
            self.waited += time.monotonic() - waiting
            images, targets = self.augment(images, labels, self.epoch)
            if self.recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self.synchronized_gradients(last=micro == accum - 1):
                with self.autocast():
                    logits = self.net(images).float()  # (B, classes)
                    loss = self.loss(logits, targets)
                self.verdict.ask(loss, self.stop.signal, self.due_to_save())
                self.scaler.scale(loss / accum).backward()
            bad_now, signal_now, save_now = self.verdict.read()
            bad, signal, save = bad or bad_now, max(signal, signal_now), save or save_now
            if not bad_now:
                self.meter.add(loss.detach() * len(labels), logits, labels)
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
            parameters = model_parameters(self.model, exclude_head=recipe.clip_mode == "agc")
            dispatch_clip_grad(parameters, recipe.clip_grad, mode=recipe.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates + 1)

    def finish_epoch(self) -> int:
        """Validate, record, keep the best, save; the signal that came meanwhile, or 0."""
        train, score = self.meter.read(self.world), None
        row: dict[str, Any] = {"epoch": self.epoch, "update": self.updates}
        row |= {"train_loss": train["loss"], "train_top1": train["top1"]}
        if (self.epoch + 1) % self.recipe.eval_every == 0 or self.epoch + 1 == self.epochs:
            for name, model in self.models().items():
                figures, signal = self.validate(model)
                if signal:  # the checkpoint says "epoch trained"; a resumed run validates it
                    self.save()
                    return signal
                row |= {f"{name}_{key}": figures[key] for key in ("loss", "top1", "top5")}
                score = figures["top1"]  # that of the average, if there is one
        row |= {key: value for key, value in self.figures().items() if key not in ("loss", "top1")}
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        if self.recipe.sched == "plateau" and score is not None:
            self.scheduler.step(self.epoch, score)
        if score is not None and score > self.best:
            self.best = score
            if self.world.is_main:
                metadata = {"model": self.recipe.model, "epoch": str(self.epoch)}
                weights = list(self.models().values())[-1].state_dict()
                checkpoint.save_weights(self.folder / "best.safetensors", weights, metadata)
        self.meter, self.seconds, self.waited = Meter(self.device), 0.0, 0.0
        self.save()
        self.log.add(row)
        self.log.summarize(self.history)
        self.progress.end()
        self.progress.say(describe_epoch(row, self.epochs, self.seconds_left()))
        if self.world.is_main:
            pictures.draw_curves(self.folder / "curves.png", self.history, self.folder.name)
        return 0

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> tuple[dict[str, float], int]:
        """Loss, top-1 and top-5 over every validation image once, by all processes together."""
        if self.world.size > 1:
            distribute_bn(model, self.world.size, reduce=False)
        model.eval()
        self.progress.begin("validation", len(self.val_loader))
        meter = Meter(self.device)
        for number, (images, labels) in enumerate(self.val_loader):
            with self.autocast():
                logits = model(images).float()  # (B, classes)
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            meter.add(loss, logits, labels)
            if self.val_loader.equal_batches and number % 10 == 0:
                signal = self.world.max(torch.tensor(self.stop.signal, device=self.device))
                if signal:
                    return {}, int(signal)
            if self.progress.live and self.progress.due():
                self.progress.show(number + 1, "")
        return meter.read(self.world), 0

    def close(self) -> None:
        """End the loader processes and the logs."""
        self.train_loader.close()
        self.val_loader.close()
        self.log.close()

    # --- parts of the loop

    def models(self) -> dict[str, nn.Module]:
        """The networks to validate; the last one is what the run is about."""
        return {"val": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def autocast(self) -> Any:
        """Mixed precision, if the recipe wants it."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def synchronized_gradients(self, last: bool) -> Any:
        """DDP exchanges gradients only with the last batch of an update."""
        if isinstance(self.net, DistributedDataParallel) and not last:
            return self.net.no_sync()
        return nullcontext()

    def give_up(self) -> NoReturn:
        """Stop after too many bad updates in a row, with the weights from before them saved."""
        places = self.bad_steps.in_a_row
        names = [name for place in places for name in self.train_loader.names(*place)]
        everyone: list[str] = sum(self.world.gather(names), [])
        self.save()
        raise self.bad_steps.error(everyone, self.folder, self.world.is_main)

    def due_to_save(self) -> bool:
        """Whether the checkpoint within the epoch is due after this update."""
        steps, minutes = self.recipe.save_every_steps, self.recipe.save_every_minutes
        by_clock = minutes > 0 and time.monotonic() - self.saved > 60 * minutes
        return (steps > 0 and (self.updates + 1) % steps == 0) or by_clock

    # --- what can be taken up again

    def save(self) -> None:
        """Write ``last.pt``."""
        mine = {"rng": checkpoint.get_rng_state(), "meter": self.meter.sums.cpu()}
        ranks = self.world.gather(mine)
        self.saved = time.monotonic()
        if not self.world.is_main:
            return
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"ranks": ranks, "recipe": dataclasses.asdict(self.recipe)}
        checkpoint.save_state(self.folder / "last.pt", state)

    def parts(self) -> dict[str, Any]:
        """All that has a ``state_dict``, by its name in the checkpoint."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler
        if self.recipe.sched == "plateau":
            parts["plateau"] = self.scheduler.lr_scheduler  # timm leaves its counters out
        if self.ema is not None:
            parts["model_ema"] = self.ema.module
        return parts

    def resume(self, state: dict[str, Any], path: Path) -> None:
        """Continue from ``state``, bit for bit if the processes are as many as before.

        Raises:
            CheckpointFileError: it belongs to another model or recipe.
        """
        try:
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            for name in COUNTERS:
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointFileError(f"{path} does not fit this recipe: {error}") from error
        ranks, mine = state["ranks"], self.world.rank
        if len(ranks) == self.world.size:
            checkpoint.set_rng_state(ranks[mine]["rng"])
            self.meter.sums.copy_(ranks[mine]["meter"])
        elif self.world.is_main:
            self.meter.sums.copy_(sum(rank["meter"] for rank in ranks))
        before = build.images_per_update(Recipe(**state["recipe"]), len(ranks))
        now = build.images_per_update(self.recipe, self.world.size)
        if before != now:  # go on with the image where it stopped, as nearly as batches allow
            self.step = min(self.step * before // now, self.updates_per_epoch)
            self.updates = self.epoch * self.updates_per_epoch + self.step
        self.log.rewind(self.updates)
        self.progress.say(f"going on from {path}: epoch {self.epoch + 1}, update {self.updates}")
        for line in differences(self.recipe, state["recipe"]):
            self.progress.say(f"  changed since: {line}")

    # --- what goes on, for people

    def figures(self) -> dict[str, float]:
        """This process's figures of the epoch so far."""
        means, recipe = self.meter.read(), self.recipe
        images = self.step * build.images_per_update(recipe, self.world.size)
        return {
            "loss": means["loss"],
            "top1": means["top1"],
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": images / max(self.seconds, 1e-9),
            "data_wait": self.waited / max(self.seconds, 1e-9),
            "memory_mb": peak_memory(self.device),
            "seconds": self.seconds,
            "skipped": self.skipped,
        }

    def seconds_left(self) -> float:
        """Of the whole run, at the pace of this process so far."""
        left = self.epochs * self.updates_per_epoch - self.updates
        pace = (time.monotonic() - self.begun) / max(self.updates - self.done_before, 1)
        return left * pace

    def describe(self) -> str:
        """The figures as the text beside the bar."""
        now = self.figures()
        return (
            f"loss {now['loss']:.3f}  accuracy {now['top1']:.1f} %  "
            f"{now['images_per_second']:.0f} images/s  {duration(self.seconds_left())} left"
        )

    def show_results(self) -> None:
        """Draw the predictions of the best weights and say where everything is."""
        if not self.world.is_main:
            return
        model, best = list(self.models().values())[-1], self.folder / "best.safetensors"
        if best.exists():
            model.load_state_dict(safetensors.torch.load_file(best))
        shown = pictures.pick_predictions(model.eval(), self.val_loader, self.config, self.autocast)
        title = f"{self.recipe.model}: {self.best:.2f} % of the validation images right"
        title += ", mistakes first" if shown and shown[0].answer != shown[0].truth else ""
        path = self.folder / "predictions.png"
        pictures.draw_predictions(path, shown, self.classes, title)
        seconds = time.monotonic() - self.begun
        self.progress.say(f"best accuracy {self.best:.2f} % after {duration(seconds)}")
        self.progress.say_results(self.folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; the exit status."""
    try:
        recipe, options = parse_command_line(argv, description=__doc__ or "")
        if options.print_config:
            sys.stdout.write(dump_recipe(recipe))
            return 0
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        with stop_on_signals() as stop, world_of_processes(recipe.device) as world:
            folder = world.gather(choose_folder(recipe, options) if world.is_main else None)[0]
            return train(recipe, folder, world, stop)
    except (TrainingError, backbones.CheckpointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def train(recipe: Recipe, folder: Path, world: World, stop: StopRequest) -> int:
    """Build everything, take up an earlier state if the recipe wants that, and run."""
    progress = Progress(world)
    trainer = Trainer(recipe, folder, world, stop, progress)
    if world.is_main:
        text = dump_recipe(
            build.resolved_recipe(
                recipe, trainer.config, trainer.num_classes, trainer.lr, folder.name
            )
        )
        checkpoint.write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    if recipe.resume == "auto":
        found = checkpoint.load_latest(folder / "last.pt")
        if found is not None:
            state, path, problem = found
            if problem:
                progress.say(f"{problem}; falling back to {path}")
            trainer.resume(state, path)
    elif recipe.resume is not None:
        trainer.resume(checkpoint.load_state(Path(recipe.resume)), Path(recipe.resume))
    try:
        return trainer.run()
    finally:
        progress.end()
        trainer.close()


if __name__ == "__main__":
    sys.exit(main())
