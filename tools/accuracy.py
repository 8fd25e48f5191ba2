"""Measure what models learn and keep: parity with the originals, learning, int8.

    python tools/accuracy.py parity               # all families, a few minutes
    python tools/accuracy.py parity van shvit     # only these; the rest is kept
    python tools/accuracy.py learning             # train what docs/learning.json lacks
    python tools/accuracy.py learning van_b0      # train this model (again)
    python tools/accuracy.py int8 --checkpoints runs/digits --train --resume
    python tools/accuracy.py agreement --checkpoints runs/digits --against openvino_nncf

The classifiers are the smallest of each family, trained on scikit-learn's digits by
``configs/cls/bench_digits.yaml`` one after another, one to ten minutes each on an idle core; HAT by
``configs/sr/quickstart.yaml``. A run in ``--checkpoints`` is ``FOLDER/MODEL``. Each result is
written as soon as it is measured; ``make pages`` puts all of them into the pages.
"""

from __future__ import annotations

import copy
import csv
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from contenders import PACKAGES, TOOLKITS
from torch import Tensor, nn

import backbones
from backbones.cli import parity as originals
from backbones.cli.contenders import reason
from backbones.cli.reports import load_report, parsed, put_rows, read_report, write_report
from backbones.cli.timing import machine, processor_name
from backbones.common.arguments import nonempty_path
from backbones.common.console import Parser, guard
from backbones.common.errors import CREATION_ERRORS, CommandError
from backbones.common.errors import MendableError as TrainingError
from backbones.common.messages import first_line
from backbones.common.processes import World
from backbones.core.loaded import preprocessing_by
from backbones.core.registry import PREFIX
from backbones.core.requirements import installed_version
from backbones.data.corrupt import CorruptImages
from backbones.data.sources import ImageSource
from backbones.data.splits import open_splits
from backbones.restoration.data import degrade_picture, find_pictures, load_truth
from backbones.restoration.metrics import quality
from backbones.restoration.recipe import RestorationRecipe
from backbones.restoration.restorer import load_restorer
from backbones.training.command_line import load_recipe
from backbones.training.loader import ValidationLoader
from backbones.training.recipe import Recipe
from backbones.training.trained import load_trained
from ops.fuse.calls import CALLS_TO_REPLAY
from ops.fuse.replayed import Replayed

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DIGITS = ROOT / "configs" / "cls" / "bench_digits.yaml"
PICTURES = ROOT / "configs" / "sr" / "quickstart.yaml"
_RECIPES = [yaml.safe_load(p.read_text(encoding="utf-8")) for p in DIGITS.parent.glob("*.yaml")]
# The smallest variant of each family, which its published recipe lists first.
CLASSIFIERS = tuple(sorted(next(iter(r["variants"])) for r in _RECIPES if "variants" in r))
RESTORER = "hat_nano_x2"
CALIBRATION = 64  # digits
_BATCH = 71  # a fifth of the validation images
_CPU = torch.device("cpu")
_PATCH = 64  # side of the input in a picture's middle that HAT is calibrated with

# -- trained networks and their images -------------------------------------------------------------


class Digits(NamedTuple):
    """A trained classifier, preprocessed training images, and all validation images."""

    model: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor


class Pictures(NamedTuple):
    """A trained restorer with batches to calibrate it and pairs of input and truth, (C, H, W)."""

    model: nn.Module
    calibration: list[Tensor]
    pairs: list[tuple[Tensor, Tensor]]


def train(model: str, folder: Path) -> Path:
    """Train a model in a process of its own, on one thread; returns the run's folder.

    Raises:
        SystemExit: the training failed.
    """
    script = ["tools/sr.py", "train"] if model == RESTORER else ["train_cls.py"]
    config = PICTURES if model == RESTORER else DIGITS
    words = ["--config", config, "--model", model, "--output", folder.resolve(), "--name", model]
    run_script([*script, *words])
    return folder / model


def run_script(command: Sequence[Any]) -> None:
    """Run a script of the checkout on one thread.

    Raises:
        SystemExit: it failed.
    """
    words = [sys.executable, *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if status := subprocess.run(words, env=environment, cwd=ROOT).returncode:
        raise SystemExit(f"{' '.join(words[1:4])} … ended with status {status}")


def _family(model: str) -> str:
    families = {m: f for f in backbones.list_families() for m in backbones.list_models(family=f)}
    return "timm" if model.startswith(PREFIX) else families[model]


def digits_run(folder: Path, model: str) -> Digits:
    """A classifier's run in ``folder``, and the first training and all validation images.

    Raises:
        TrainingError: there is no such run, or it is of another kind.
    """
    recipe = load_recipe(folder / model / "config.yaml", {"workers": 0, "batch_size": 32})
    splits = open_splits(recipe)
    weights = str(folder / model / "best.safetensors")
    network = load_trained(model, weights, len(splits.classes), recipe.in_chans, recipe.model_args)
    config = preprocessing_by(recipe, network)
    assert isinstance(splits.train, ImageSource) and isinstance(splits.validation, ImageSource)
    calibration, _ = _preprocessed(splits.train, CALIBRATION, config, recipe)
    images, labels = _preprocessed(splits.validation, len(splits.validation), config, recipe)
    return Digits(network.eval(), calibration, images, labels)


def _preprocessed(
    source: ImageSource, count: int, config: dict[str, Any], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """The first ``count`` images, without augmentation, and their labels."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        corrupt, world = CorruptImages(Path(folder) / "corrupt.txt", 0), World(0, 1, _CPU)
        loader = ValidationLoader(source, config, recipe, world, corrupt)
        try:
            for batch, truth in loader:
                images.append(batch)
                labels.append(truth)
                if sum(map(len, labels)) >= count:
                    break
        finally:
            loader.close()
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def pictures_run(folder: Path, model: str = RESTORER) -> Pictures:
    """A restorer's run in ``folder``, middles of its training pictures and all validation pictures.

    Raises:
        TrainingError: there is no such run, or it is of another kind.
    """
    recipe = load_recipe(folder / model / "config.yaml", {}, RestorationRecipe)
    network: Any = load_restorer(model, folder / model / "best.safetensors").eval()

    def pairs(paths: Sequence[Path]) -> list[tuple[Tensor, Tensor]]:
        truths = [load_truth(path, recipe.in_chans, network.upscale) for path in paths]
        return [
            degrade_picture(recipe, t, network.upscale, number) for number, t in enumerate(truths)
        ]

    training = find_pictures(recipe.train_pictures, training=True)
    calibration = [_middle(degraded).unsqueeze(0) for degraded, _ in pairs(training)]
    validation = find_pictures(recipe.val_pictures, training=False)
    return Pictures(network, calibration, pairs(validation))


def _middle(image: Tensor) -> Tensor:
    top, left = (max(0, (side - _PATCH) // 2) for side in image.shape[1:])
    return image[:, top : top + _PATCH, left : left + _PATCH]


# -- int8 ------------------------------------------------------------------------------------------

Fuse = Callable[[nn.Module, Sequence[Tensor]], nn.Module]
FORMS: dict[str, Fuse] = {
    "fused": lambda model, _: backbones.fuse(model),
    "bfloat16": lambda model, _: backbones.fuse(model, dtype=torch.bfloat16),
    "int8": lambda model, _: backbones.fuse(model, dtype=torch.int8),
    "int8_calibrated": lambda model, images: backbones.fuse(
        model, dtype=torch.int8, calibrate=images
    ),
}
"""By label: how a copy of the model is fused, given batches of calibration images."""


@torch.inference_mode()
def predict(run: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    """The outputs for all images in float32, ``batch`` at a time; the last is filled up."""
    outputs = []
    for part in images.split(batch):
        filled = torch.cat((part, part[:1].expand(batch - len(part), *part.shape[1:])))
        outputs.append(run(filled)[: len(part)].float())
    return torch.cat(outputs)


def compare(outputs: Tensor, exact: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and agreement of predictions with those of ``exact`` in %, and the relative error.

    Args:
        outputs, exact: (N, classes).
        labels: (N,).
    """
    predicted = outputs.argmax(1)
    error = (outputs.double() - exact.double()).norm() / exact.double().norm()
    return {
        "top1": 100 * (predicted == labels).double().mean().item(),
        "agreement": 100 * (predicted == exact.argmax(1)).double().mean().item(),
        "error": error.item(),
    }


def of_digits(run: Digits) -> dict[str, Any]:
    """The figures of a classifier, in each of :data:`FORMS`."""
    exact = predict(run.model, run.images, _BATCH)
    found = {"float32": compare(exact, exact, run.labels)}

    def measure(model: nn.Module) -> dict[str, float]:
        return compare(predict(_in_dtype(model), run.images, _BATCH), exact, run.labels)

    forms, layers = _measure_forms(run.model, run.calibration.split(32), measure)
    counts = {"images": len(run.labels), "calibration_images": len(run.calibration)}
    return {"kind": "digits", **counts, **layers, "forms": found | forms}


def of_pictures(run: Pictures) -> dict[str, Any]:
    """The figures of a restorer, in each of :data:`FORMS`: mean PSNR of luma in dB."""

    def measure(model: nn.Module) -> dict[str, float]:
        restore = _in_dtype(model)
        scale = int(run.model.upscale)  # type: ignore[arg-type]
        with torch.inference_mode():
            scores = [
                quality(restore(degraded.unsqueeze(0))[0].float(), truth, scale)
                for degraded, truth in run.pairs
            ]
        return {"psnr": math.fsum(score["psnr_y"] for score in scores) / len(scores)}

    forms, layers = _measure_forms(run.model, run.calibration, measure)
    counts = {"images": len(run.pairs), "calibration_images": len(run.calibration)}
    forms = {"float32": measure(run.model), **forms}
    return {"kind": "pictures", **counts, **layers, "forms": forms}


def _measure_forms(
    plain: nn.Module,
    calibration: Sequence[Tensor],
    measure: Callable[[nn.Module], dict[str, float]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures or the error of each form, and how many layers are in int8."""
    forms: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    for label, fuse in FORMS.items():
        try:
            model: Any = fuse(copy.deepcopy(plain), calibration)
            forms[label] = measure(model)
        except CREATION_ERRORS as error:
            forms[label] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
            continue
        if model.precision is not None:
            layers = {"layers": len(model.precision.layers), **layers}
            forms[label]["quantized"] = len(model.precision.quantized)
            if model.precision.reason:
                forms[label]["reason"] = model.precision.reason
    return forms, layers


def _in_dtype(model: nn.Module) -> Callable[[Tensor], Tensor]:
    dtype = next(model.parameters()).dtype
    known: set[torch.Size] = set()

    def run(images: Tensor) -> Tensor:
        """The output of a call that is replayed, if such calls are."""
        images = images.to(dtype)
        new = isinstance(model, Replayed) and images.shape not in known
        known.add(images.shape)
        for _ in range(CALLS_TO_REPLAY if new else 0):
            model(images)
        return model(images)

    return run


def measure_model(name: str, folder: Path) -> dict[str, Any]:
    """The row of a model, from its run in ``folder``."""
    restores = name == RESTORER
    of = of_pictures(pictures_run(folder)) if restores else of_digits(digits_run(folder, name))
    return {"model": name, "family": _family(name), **of}


def _options(command: Callable[..., Any], names: Sequence[str]) -> Parser:
    parser = Parser(prog=f"accuracy.py {command.__name__}", description=command.__doc__)
    parser.add_argument("--models", nargs="+", default=names, metavar="NAME", help="default: all")
    parser.add_argument("--checkpoints", type=nonempty_path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--resume", action="store_true", help="skip models that the output already has"
    )
    return parser


def _begin(args: Any) -> tuple[dict[str, Any], list[str]]:
    """The report so far, and the models that are left to measure."""
    ours = {name for name in args.models if not name.startswith(PREFIX)}
    unknown = ours - {RESTORER, *backbones.list_models()}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise CommandError(f"unknown models {names}; see backbones.list_models()")
    torch.set_num_threads(1)
    report = load_report(args.output, machine(_CPU))
    done = {row["model"] for row in report["results"]} if args.resume else set()
    return report, [name for name in args.models if name not in done]


def _keep(path: Path, report: dict[str, Any], row: dict[str, Any], shown: dict[str, Any]) -> None:
    put_rows(report, [row], ("model",))
    write_report(path, report)
    for label, figures in shown.items():
        logger.info("%-20s %-20s %s", row["model"], label, figures)


def _has_run(args: Any, name: str) -> bool:
    return bool((args.checkpoints / name / "best.safetensors").is_file())


def int8(arguments: Sequence[str]) -> None:
    """The accuracy of models fused in int8: all families on digits, HAT on photographs.

    Each model is compared with itself in float32 before fuse(): fused in float32 and bfloat16, and
    in int8 with a range for each row of inputs (dynamic) and with ranges from 64 training images
    (calibrated).
    """
    parser = _options(int8, [*CLASSIFIERS, RESTORER])
    parser.add_argument("--train", action="store_true", help="first train models that have no run")
    args = parsed(parser, arguments, DOCS / "performance" / "int8_accuracy.json")
    report, names = _begin(args)
    missing = [] if args.train else [name for name in names if not _has_run(args, name)]
    for name in (name for name in names if name not in missing):
        if not _has_run(args, name):
            train(name, args.checkpoints)
        try:
            row = measure_model(name, args.checkpoints)
        except TrainingError as error:
            raise CommandError(f"{args.checkpoints / name}: {error}") from error
        _keep(args.output, report, row, row["forms"])
    if missing:
        logger.info("no run of %s in %s: add --train", ", ".join(missing), args.checkpoints)


def agreement(arguments: Sequence[str]) -> None:
    """Predictions of the digits in int8 by other toolkits, one image at a time on one thread.

    Every contender is calibrated with the same training images. `benchmark.py --against` measures
    their times.
    """
    parser = _options(agreement, CLASSIFIERS)
    labels = list(TOOLKITS)
    parser.add_argument("--against", nargs="*", default=labels, choices=labels, metavar="LABEL")
    args = parsed(parser, arguments, DOCS / "performance" / "int8_agreement.json")
    report, names = _begin(args)
    for name in names:
        if not _has_run(args, name):
            logger.info("no run of %s in %s", name, args.checkpoints)
            continue
        row = of_agreement(name, args.checkpoints, args.against)
        _keep(args.output, report, row, row["contenders"])


def of_agreement(name: str, checkpoints: Path, toolkits: Sequence[str]) -> dict[str, Any]:
    """The row of a classifier."""
    run = digits_run(checkpoints, name)
    exact = predict(run.model, run.images, 1)
    images = list(run.calibration.split(1))
    folded = backbones.fuse(copy.deepcopy(run.model), channels_last=False).requires_grad_(False)
    found: dict[str, Any] = {"float32": compare(exact, exact, run.labels)}
    with tempfile.TemporaryDirectory() as folder:

        def by_fuse(label: str) -> tuple[Callable[[Tensor], Tensor], dict[str, int]]:
            return _in_dtype(FORMS[label](copy.deepcopy(run.model), images)), {}

        def by_toolkit(label: str) -> tuple[Callable[[Tensor], Tensor], dict[str, int]]:
            start, size = TOOLKITS[label](folded, images, Path(folder))
            return start(1), {"bytes": size}

        for label in (*FORMS, *toolkits):
            title = "fused+bfloat16" if label == "bfloat16" else label  # as in benchmarks
            try:
                model, size = (by_fuse if label in FORMS else by_toolkit)(label)
                outputs = predict(model, run.images, 1)
            except Exception as error:  # the toolkits' exceptions have no common base
                found[title] = {"skipped": reason(error)}
            else:
                found[title] = {**compare(outputs, exact, run.labels), **size}
    versions = {name: v for name in PACKAGES if (v := installed_version(name))}
    counts = {"images": len(run.labels), "calibration_images": len(images)}
    return {"model": name, **counts, "contenders": found, "versions": versions}


# -- learning --------------------------------------------------------------------------------------


def train_variant(model: str) -> dict[str, Any]:
    """Train one variant in a process of its own.

    Raises:
        SystemExit: the training failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = os.times()
        run = train(model, Path(folder))
        after = os.times()
        rows = list(csv.DictReader((run / "summary.csv").read_text().splitlines()))
    with torch.device("meta"):
        network = backbones.create_model(model, num_classes=10)
    keys = ("train_loss", "train_top1", "val_loss", "val_top1")
    spent = after.children_user + after.children_system
    return {
        "family": _family(model),
        "parameters": sum(p.numel() for p in network.parameters()),
        "cpu_seconds": round(spent - before.children_user - before.children_system, 1),
        "updates_per_epoch": int(rows[0]["update"]),
        "history": [{key: float(row[key]) for key in keys} for row in rows],
    }


def _earlier(path: Path) -> dict[str, Any]:
    """What an earlier run wrote: ``results`` by model, and more."""
    return read_report(path) if path.exists() else {"results": {}}


def _here() -> str:
    return f"torch {torch.__version__} on {processor_name()}, one thread"


def learning(arguments: Sequence[str]) -> None:
    """Train the smallest variant of each family on scikit-learn's digits."""
    parser = Parser(prog="accuracy.py learning", description=learning.__doc__)
    text = "train these (again); default: those that are missing"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=text)
    parser.add_argument("--output", type=nonempty_path, default=DOCS / "learning.json")
    options = parser.parse_args(arguments)
    recipe = yaml.safe_load(DIGITS.read_text(encoding="utf-8"))
    path = options.output
    report = _earlier(path)
    if report.get("recipe") != recipe:
        report = {"results": {}}  # the recipe changed: discard all results
    here = _here()
    report.setdefault("machine", here)
    report["recipe"] = recipe
    for model in options.models or [m for m in CLASSIFIERS if m not in report["results"]]:
        result = train_variant(model)
        if here != report["machine"]:
            result["machine"] = here
        report["results"][model] = result
        report["results"] = dict(sorted(report["results"].items()))
        write_report(path, report)


# -- parity ----------------------------------------------------------------------------------------


def measure_parity(family: str, variant: str) -> dict[str, Any]:
    """Maximum errors of one variant over its cases, and the CPU that made them."""
    count = len(originals.reference(family, variant)["cases"])
    errors = [originals.case_errors(family, variant, number) for number in range(count)]
    return {
        "output": max(output for output, _ in errors),
        "stages": max(max(stages) for _, stages in errors),
        "cpu": processor_name(),
    }


def parity(arguments: Sequence[str]) -> None:
    """Compare every variant with the recorded figures of its original, as the tests do."""
    parser = Parser(prog="accuracy.py parity", description=parity.__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--output", type=nonempty_path, default=DOCS / "parity.json")
    options = parser.parse_args(arguments)
    known = {family for family, _ in originals.variants()}
    if unknown := set(options.families) - known:
        parser.error(f"unknown families {sorted(unknown)}; there are {sorted(known)}")
    path = options.output
    report = _earlier(path)
    results = report["results"]
    for family, variant in originals.variants():
        if not options.families or family in options.families:
            results[variant] = measure_parity(family, variant)
            logger.info("%s: output %.1e", variant, results[variant]["output"])
    write_report(path, {**report, "results": dict(sorted(results.items()))})


COMMANDS = {command.__name__: command for command in (parity, learning, int8, agreement)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = Parser(description=__doc__, usage=f"accuracy.py {{{','.join(COMMANDS)}}} …")
    parser.add_argument("command", choices=list(COMMANDS), help="each has its own --help")
    COMMANDS[parser.parse_args(words[:1]).command](words[1:])


if __name__ == "__main__":
    sys.exit(guard(main))
