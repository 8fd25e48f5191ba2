"""Train a classifier: recipe → model → data → loop.

    python train_cls.py --config configs/cls/quickstart.yaml
    python train_cls.py --config configs/cls/van.yaml --model van_b2 --data /path/to/imagenet
    torchrun --nproc-per-node 8 train_cls.py --config …

Every key of the recipe is a flag; ``--help`` lists them and ``--print-config`` prints the resolved
recipe. Results go to ``OUTPUT/NAME/``: ``best.safetensors``, ``last.pt`` (the state for resuming,
weights under ``model``), ``summary.csv``, ``metrics.jsonl``, ``curves.png``, ``predictions.png``,
``config.yaml``. ``--resume auto`` continues after a crash or a signal. ``--fuse`` compares the best
weights before and after ``backbones.fuse`` at the end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import safetensors.torch
import torch
from timm.utils import distribute_bn
from torch import nn

from backbones.cli.timing import processor_name
from backbones.common.messages import first_line
from backbones.common.progress import duration
from backbones.core.loaded import preprocessing_by
from backbones.data.corrupt import CorruptImages
from backbones.data.splits import open_splits
from backbones.training import build, comparison, pictures
from backbones.training.distillation import StudentWithExits
from backbones.training.loader import TrainLoader, ValidationLoader
from backbones.training.loop import TrainingLoop
from backbones.training.recipe import Recipe
from backbones.training.record import count_batch, mean_auc, means_of, validation_loss
from backbones.training.run import run_from_command_line

_SMALL = 32  # pixels, the smallest images that every network of this library supports


class Trainer(TrainingLoop):
    """Training of a classifier: model, data and metrics; the base class has the loop."""

    factors: ClassVar[Mapping[str, float]] = {"loss": 1.0, "top1": 100.0}
    count_of_sums = 4  # of the five best classes, too
    texts: ClassVar[Mapping[str, str]] = {
        **{"train_loss": "loss {:.3f}", "train_top1": "accuracy {:5.1f} %"},
        **{"val_top1": "validation {:6.2f} %", "val_auc": "AUC {:6.2f} %"},
        **{"ema_top1": "averaged {:6.2f} %", "ema_auc": "AUC {:6.2f} %"},
        "images_per_second": "{:.0f} images/s",
    }

    def prepare(self) -> None:
        """Open the data and build model, loss and loaders."""
        self.recipe = recipe = build.resolve_memory_format(self.recipe, self.device)
        splits = open_splits(recipe)
        self.classes, self.multi_label = splits.classes, splits.multi_label
        self.num_classes = splits.num_classes
        self.score_key = "auc" if self.multi_label else "top1"
        self.facts = {"classes": json.dumps(self.classes)}  # for ``vision-backbones predict``

        model = build.build_model(recipe, self.num_classes).to(self.device)
        self.config = preprocessing_by(recipe, model)
        smallest = min([self.config["input_size"][-1], *recipe.img_size_schedule.values()])
        network = model
        if recipe.distill == "ofa":
            network = StudentWithExits(model, recipe.ofa_stages).to(self.device)
        self.objective = build.build_objective(
            recipe, self.num_classes, self.config, self.multi_label, self.device
        )
        self.augment = build.BatchAugmentation(recipe, self.num_classes, self.device)

        corrupt = [
            CorruptImages(self.folder / f"corrupt_{split}.txt", recipe.max_corrupt)
            for split in ("train", "validation")
        ]
        shared = self.config, recipe, self.world
        self.train_loader = TrainLoader(splits.train, *shared, corrupt[0])
        self.val_loader = ValidationLoader(splits.validation, *shared, corrupt[1])
        self.set_up(model, self.train_loader.batches // recipe.accum_steps, network)
        if smallest < _SMALL or recipe.batch_size == 1 or recipe.distill is not None:
            self.dry_run(self.train_loader.blank(smallest, self.multi_label, self.num_classes))

    def resolved_recipe(self) -> Recipe:
        """With all defaults resolved; it repeats the same run."""
        return dataclasses.replace(
            self.recipe,
            img_size=self.config["input_size"][-1],
            mean=tuple(self.config["mean"]),
            std=tuple(self.config["std"]),
            interpolation=self.config["interpolation"],
            crop_pct=self.config["crop_pct"],
            num_classes=self.num_classes,
            lr=self.lr,
            name=self.folder.name,
            resume=None,
            overwrite=False,
        )

    # --- a step

    def compute(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment, run the network, compute the loss; counts with the labels before mixing."""
        images, labels = batch
        images, targets = self.augment(images, labels, self.epoch)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss, logits = self.objective(self.net, images, targets)
        return loss, count_batch(loss.detach() * len(labels), logits.detach(), labels)

    # --- an epoch

    def finish_epoch(self) -> int:
        """Validate, record, save, draw; returns the signal received meanwhile, or 0."""
        signal = super().finish_epoch()
        if not signal and self.world.is_main:
            pictures.draw_curves(self.folder / "curves.png", self.history, self.folder.name)
        return signal

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> tuple[dict[str, float], int]:
        """Loss, top-1 and so on over all validation images, divided among the processes."""
        if self.world.size > 1:
            distribute_bn(model, self.world.size, reduce=False)
        model.eval()
        self.progress.begin("validation", len(self.val_loader))
        sums, scores = torch.zeros_like(self.sums), []  # the latter for several labels
        for number, (images, labels) in enumerate(self.val_loader):
            with self.autocast():
                logits = model(images).float()  # (B, classes)
            sums += count_batch(validation_loss(logits, labels), logits, labels)
            if self.multi_label:
                counted = labels[:, 0] >= 0
                scores.append((logits[counted].cpu(), labels[counted].cpu()))
            may_ask = self.val_loader.equal_batches and number % 10 == 0
            if may_ask and (signal := self.stop_signal()):
                return {}, signal
            if self.progress.live and self.progress.due():
                self.progress.show(number + 1, "")
        figures = means_of(self.world.sum(sums), {**self.factors, "top5": 100.0})
        if scores:
            everyone = sum(self.world.gather(scores), [])
            figures["auc"] = 100 * mean_auc(*map(torch.cat, zip(*everyone, strict=True)))
        return figures, 0

    def close(self) -> None:
        """End the loader processes and the logs."""
        self.val_loader.close()
        super().close()

    # --- reporting

    def run(self) -> int:
        """Train to the end and, if requested, fuse the best weights; the exit status."""
        status = super().run()
        if status == 0 and self.recipe.fuse and self.world.is_main:
            status = self.compare_fused()
        return status

    def best_model(self) -> Any:
        """A new model with the best weights, since the trained one may be sharded."""
        model = build.build_model(self.recipe, self.num_classes, weights=False)
        model.load_state_dict(safetensors.torch.load_file(self.folder / "best.safetensors"))
        return model.to(self.device).eval()

    def show_results(self) -> None:
        """Draw predictions of the best weights."""
        best, seconds = self.folder / "best.safetensors", time.monotonic() - self.begun
        if best.exists() and not self.multi_label:
            images, title = self.val_loader, f"{self.recipe.model}: {self.best:.2f} %"
            model = self.best_model()
            shown = pictures.pick_predictions(model, images, self.config, self.autocast)
            title += " of the validation images correct"
            path = self.folder / "predictions.png"
            pictures.draw_predictions(path, shown, self.classes, title)
        kind = "AUC" if self.multi_label else "accuracy"
        self.progress.say(f"best {kind} {self.best:.2f} % after {duration(seconds)}")

    def compare_fused(self) -> int:
        """Print accuracy and time before and after ``fuse()``; the exit status.

        All files are complete by now, so an error here is reported, and the run has succeeded.
        """
        loader, say = self.val_loader, self.progress.say
        count = min(len(loader) * loader.batch_size, len(loader.source))
        try:
            found = comparison.compare(self.best_model(), loader, count, self.progress, self.stop)
            report = found and f"\n{found.report(processor_name())}"
        except Exception as error:  # of a layer, a kernel, a compiler, the loader, …
            say(f"not compared with the fused network: {type(error).__name__}: {first_line(error)}")
            return 0
        finally:
            self.progress.end()
        if report is None:
            say(f"stopped by signal {self.stop.signal} before the fused network was measured")
            return 128 + self.stop.signal
        say(report)
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line; the exit status."""
    return run_from_command_line(Trainer, Recipe, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
