"""``vision-backbones validate``: accuracy of classifiers, real labels, robustness, confusions.

ImageNet's protocol: resize so that the centre crop is ``crop_pct`` of the shorter side, with the
size, interpolation and normalisation that each model's ``pretrained_cfg`` (or its run's
``config.yaml``) states. ``--real-labels`` adds the accuracy on the reassessed labels
(https://arxiv.org/abs/2006.07159), ``--corrupt`` that on ImageNet-C's corruptions at 5 severities
(https://arxiv.org/abs/1903.12261). Each row is written as soon as it is measured; if a model fails,
its row has the error and the others continue.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import backbones
from backbones.cli.common import read_text
from backbones.common.arguments import THREADS, nonempty, nonempty_path, real, usable_device, whole
from backbones.common.confusion import class_report, confusion_matrix, draw_confusions
from backbones.common.errors import CREATION_ERRORS, DataError, MendableError, RecipeError
from backbones.common.files import write_text_atomically
from backbones.common.messages import first_line
from backbones.common.outputs import (
    FIGURE,
    Kind,
    add_overwrite,
    csv_of,
    csv_of_rows,
    require_folder,
    require_writable,
)
from backbones.common.processes import World
from backbones.common.progress import Progress, duration
from backbones.core.loaded import preprocessing_by
from backbones.data.corrupt import CorruptImages
from backbones.data.sources import ImageSource
from backbones.data.splits import Splits, open_splits
from backbones.training.accuracy import Predictions, predict_all, read_real_labels, real_accuracy
from backbones.training.command_line import load_recipe
from backbones.training.corruptions import (
    ALEXNET_ERROR,
    CORRUPTIONS,
    Corruption,
    mean_corruption_error,
)
from backbones.training.loader import ValidationLoader
from backbones.training.recipe import Recipe
from backbones.training.trained import load_trained

EXAMPLE = "--data /path/to/images --model van_b0 --checkpoint van_b0.pth"

# They count as a failure of one model; the others continue.
_FAILURES = (MendableError, backbones.CheckpointError, OSError, MemoryError, *CREATION_ERRORS)


class Candidate(NamedTuple):
    """A model to measure: name, weights (None: the published ones) and recipe."""

    name: str
    checkpoint: str | None
    recipe: Recipe


class Validator:
    """Measures one model after the other on the same images."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        default = "cuda" if torch.cuda.is_available() else "cpu"
        device = usable_device(default if options.device is None else options.device)
        self.world = World(0, 1, device)
        self.progress = Progress()
        recipe = Recipe(
            data=options.data,
            data_dir=options.data_dir,
            download=options.download,
            class_map=options.class_map,
            train_split="train" if options.data == "digits" else options.split,  # both are fixed
            val_split=options.split,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        self.splits: Splits = open_splits(recipe)
        real = options.real_labels
        self.real = None if real is None else read_real_labels(real)
        names = CORRUPTIONS if options.corrupt == [] else options.corrupt or ()
        severities = sorted(set(options.severity))
        # Made here, so that an unknown name is reported before anything runs.
        self.corruptions = {name: [Corruption(name, n) for n in severities] for name in names}
        self.corruption_rows: list[dict[str, Any]] = []

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """One row of the results."""
        options, recipe = self.options, candidate.recipe
        classes = len(self.splits.classes)
        model = load_trained(
            candidate.name, candidate.checkpoint, classes, recipe.in_chans, recipe.model_args
        )
        parameters = sum(p.numel() for p in model.parameters())
        config = preprocessing_by(recipe, model)
        if options.fuse:
            backbones.fuse(model.eval())
        model = model.eval().to(self.world.device)
        predictions = self.predict(model, recipe, config, candidate.name, None)
        if not math.isfinite(predictions.loss):
            raise DataError("the model's output is not finite")
        row = {
            "model": candidate.name,
            "checkpoint": candidate.checkpoint or "published",
            "images": len(predictions.labels),
            "top1": round(predictions.accuracy(1), 3),
            "top5": round(predictions.accuracy(5), 3),
            "loss": round(predictions.loss, 4),
        }
        if self.real is not None:
            assert isinstance(self.splits.validation, ImageSource)
            accuracy = real_accuracy(predictions, self.splits.validation, self.real)
            row["real_top1"] = round(accuracy, 3)
        if self.corruptions:
            row |= self.measure_corruptions(model, recipe, config, candidate.name)
        row |= {
            "parameters_m": round(parameters / 1e6, 3),
            "img_size": config["input_size"][-1],
            "crop_pct": round(config["crop_pct"], 4),
            "interpolation": config["interpolation"],
            "images_per_second": round(len(predictions.labels) / max(predictions.seconds, 1e-9), 1),
        }
        if options.report is not None:
            self.report(candidate, predictions)
        return row

    def predict(
        self,
        model: nn.Module,
        recipe: Recipe,
        config: dict[str, Any],
        title: str,
        corruption: Callable[[Any], Any] | None,
    ) -> Predictions:
        """The predictions of ``model`` for the images, corrupted or clean."""
        with tempfile.TemporaryDirectory() as folder:
            corrupt = CorruptImages(Path(folder) / "corrupt.txt", self.options.max_corrupt)
            recipe.batch_size, recipe.val_batch_size = self.options.batch_size, None
            recipe.workers = self.options.workers
            args = self.splits.validation, config, recipe, self.world, corrupt
            loader = ValidationLoader(*args, corruption)
            self.progress.begin(title, len(loader))
            try:
                predictions = predict_all(
                    model, loader, self.options.amp, lambda done: self.progress.step()
                )
            finally:
                loader.close()
                self.progress.end()
            if corrupt.count():
                self.progress.say(f"{title}: {corrupt.count()} unreadable images skipped")
        return predictions

    def measure_corruptions(
        self, model: nn.Module, recipe: Recipe, config: dict[str, Any], title: str
    ) -> dict[str, float]:
        """Accuracy under each corruption and severity, and the means of the errors."""
        errors: dict[str, list[float]] = {}
        for name, corruptions in self.corruptions.items():
            errors[name] = []
            for corruption in corruptions:
                where = f"{title}, {name} {corruption.severity}"
                top1 = self.predict(model, recipe, config, where, corruption).accuracy(1)
                errors[name].append(100 - top1)
                row = {"model": title, "corruption": name, "severity": corruption.severity}
                row |= {"top1": round(top1, 3), "error": round(100 - top1, 3)}
                self.corruption_rows.append(row)
            self.progress.say(f"{title}  {name:<18} error {np.mean(errors[name]):6.2f} %")
            write_table(corruption_path(self.options.output), self.corruption_rows)
        means = {"corruption_error": round(mean_corruption_error(errors), 3)}
        whole = set(CORRUPTIONS) <= set(errors) and len(errors[CORRUPTIONS[0]]) == 5
        if whole and len(self.splits.classes) == 1000:
            own = {name: errors[name] for name in CORRUPTIONS}
            means["mce"] = round(mean_corruption_error(own, ALEXNET_ERROR), 3)
        return means

    def report(self, candidate: Candidate, predictions: Predictions) -> None:
        """Write ``NAME.classes.csv`` and ``NAME.confusion.png``."""
        folder, classes = self.options.report, self.splits.classes
        table, picture = report_paths(folder, candidate)
        matrix = confusion_matrix(predictions.labels, predictions.top5[:, 0], len(classes))
        write_table(table, class_report(matrix, classes))
        title = f"{candidate.name}, {len(predictions.labels)} images"
        draw_confusions(picture, title, classes, {"right": matrix})
        self.progress.say(f"{table.name} and {picture.name} are in {folder}")


def corruption_path(output: Path) -> Path:
    """``results.csv`` → ``results.corruptions.csv``."""
    return output.with_suffix(".corruptions.csv")


def report_paths(folder: Path, candidate: Candidate) -> tuple[Path, Path]:
    """``NAME.classes.csv`` and ``NAME.confusion.png``."""
    name = candidate.name.replace("/", "_")
    return folder / f"{name}.classes.csv", folder / f"{name}.confusion.png"


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, atomically; their keys may differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, csv_of_rows(rows))


def find_candidates(options: Namespace) -> list[Candidate]:
    """The models of the command line: names, patterns, lists in files, and runs."""
    keys = ("img_size", "crop_pct", "interpolation", "in_chans", "model_args")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    found = []
    for word in options.model:
        names = backbones.list_models(word, pretrained=True) if set("*?[") & set(word) else [word]
        if not names:
            raise RecipeError(f"no model with published weights matches {word!r}")
        found += [Candidate(name, options.checkpoint, load_recipe(None, given)) for name in names]
    for path in options.list:
        lines = map(str.strip, read_text(path, "--list").splitlines())
        for line in (line for line in lines if line and not line.startswith("#")):
            name, *rest = line.split(maxsplit=1)
            found.append(Candidate(name, rest[0] if rest else None, load_recipe(None, given)))
    for folder in options.run:
        recipe = load_recipe(folder / "config.yaml", given, Recipe)
        found.append(Candidate(recipe.model, str(folder / "best.safetensors"), recipe))
    if not found:
        raise RecipeError("no model: give --model NAME …, --list FILE or --run FOLDER")
    if options.checkpoint and len(found) > 1:
        raise RecipeError(f"--checkpoint requires one model, not {len(found)}: use --list")
    return found


def add_arguments(parser: ArgumentParser) -> None:
    models = "(--model NAME … | --list FILE … | --run FOLDER …)"
    parser.usage = f"{parser.prog} --data DATA {models} […]"
    add = parser.add_argument
    add("--data", required=True, type=nonempty, help="as for train_cls.py; a single split suffices")
    text = "where medmnist/, torch/, hfds/, hfids/ keep files"
    add("--data-dir", type=nonempty, metavar="DIR", help=text)
    add("--download", action="store_true", help="let the source download its files")
    add("--split", type=nonempty, default="validation", help="the split to measure")
    add("--class-map", type=nonempty, metavar="FILE", help="maps class names to numbers")
    add("--model", nargs="+", default=[], metavar="NAME", help="or patterns such as 'van_*'")
    text = "weights of a single model (default: published)"
    add("--checkpoint", type=nonempty, metavar="FILE", help=text)
    several: dict[str, Any] = {"nargs": "+", "type": nonempty_path, "default": []}
    add("--list", metavar="FILE", help="file with a line NAME [CHECKPOINT] per model", **several)
    add("--run", metavar="FOLDER", help="folder of a run of train_cls.py", **several)
    add("--model-args", metavar="YAML", help="further keywords of create_model")
    add("--in-chans", type=whole(1), metavar="N", help="channels of the input")
    add("--img-size", type=whole(1, 65535), metavar="N", help="instead of the model's own")
    add("--crop-pct", type=real(0, 1, above=True), metavar="X", help="instead of the model's own")
    add("--interpolation", metavar="NAME", help="instead of the model's own")
    add("--batch-size", type=whole(1), default=128, metavar="N")
    add("--workers", type=whole(0, 256), default=4, metavar="N")
    add("--device", help="default: a GPU if there is one")
    add("--amp", choices=("bf16", "fp16"))
    add("--threads", type=THREADS, metavar="N", help="CPU threads")
    add("--fuse", action="store_true", help="fold norms and branches first")
    text = "stop if a larger fraction cannot be decoded"
    add("--max-corrupt", type=real(0, 1), default=0.001, metavar="X", help=text)
    text = "ImageNet's ReaL labels; FILE defaults to timm's copy"
    add("--real-labels", nargs="?", const="", metavar="FILE", help=text)
    text = "corruptions to apply (no NAME: ImageNet-C's 15)"
    add("--corrupt", nargs="*", metavar="NAME", help=text)
    severities: dict[str, Any] = {"type": int, "default": [1, 2, 3, 4, 5]}
    add("--severity", nargs="+", metavar="N", **severities)
    output = Path("validation.csv")
    add("--output", type=nonempty_path, default=output, metavar="CSV", help="a row for each model")
    text = "folder for tables by class and confusion matrices"
    add("--report", type=nonempty_path, metavar="FOLDER", help=text)
    add_overwrite(parser)


def _check_outputs(options: Namespace, candidates: Sequence[Candidate]) -> None:
    outputs: dict[str, tuple[Path | None, Kind]] = {
        "--output": (options.output, csv_of("model", "checkpoint"))
    }
    if options.corrupt is not None:
        table = corruption_path(options.output), csv_of("model", "corruption")
        outputs["the table of corruptions"] = table
    if options.report is not None:
        require_folder("--report", options.report)
        kinds = (csv_of("class", "images"), FIGURE)
        for candidate in candidates:
            for path, kind in zip(report_paths(options.report, candidate), kinds, strict=True):
                weights = candidate.checkpoint or "published"
                outputs[f"{path.name} of {candidate.name}, {weights}"] = path, kind
    inputs = [*options.list, options.class_map, options.real_labels or None, options.data]
    inputs += [candidate.checkpoint for candidate in candidates]
    require_writable(outputs, inputs, options.overwrite, makes_folders=True)


def run(options: Namespace) -> int:
    """Run ``validate``; 1 if any model failed."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    candidates = find_candidates(options)
    _check_outputs(options, candidates)
    validator = Validator(options)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for candidate in candidates:
        begun = time.monotonic()
        try:
            row = validator.measure(candidate)
            spent = duration(time.monotonic() - begun)
            units = dict.fromkeys(("top1", "top5", "real_top1"), " %")
            units |= {"corruption_error": "", "mce": ""}
            text = "  ".join(f"{k} {row[k]:.2f}{unit}" for k, unit in units.items() if k in row)
            validator.progress.say(f"{candidate.name}  {text}  ({row['images']} images, {spent})")
        except _FAILURES as error:
            row = {"model": candidate.name, "checkpoint": candidate.checkpoint or "published"}
            row["error"] = first_line(error)
            failed.append(candidate.name)
            sys.stderr.write(f"error: {candidate.name}: {row['error']}; continuing\n")
        rows.append(row)
        write_table(options.output, rows)
    validator.progress.say(f"results are in {options.output}")
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(candidates)} failed: {', '.join(failed)}\n")
    return 1 if failed else 0
