"""``vision-backbones predict``: classes of images as a table, CSV or JSON, with Grad-CAM pictures.

Unreadable images are reported and skipped.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.cli.cam import grad_cam
from backbones.cli.common import read_labels
from backbones.common import images
from backbones.common.arguments import FILE, nonempty_path, usable_device, whole
from backbones.common.dtypes import COMPUTED, DTYPES, check_dtype
from backbones.common.errors import CommandError, required
from backbones.common.figures import INK, drawable, new_figure, save_figure, short
from backbones.common.messages import one_line
from backbones.common.outputs import (
    FIGURE,
    add_overwrite,
    csv_of,
    csv_text,
    json_of,
    json_text,
    require_writable,
    write_if_asked,
)
from backbones.common.progress import counting
from backbones.common.resizing import Resizing
from backbones.common.tables import table
from backbones.core.base import StagedBackbone
from backbones.core.inputs import channels_of
from backbones.core.loaded import Loaded, fuse, load, preprocessing

EXAMPLE = "photos/ --checkpoint runs/quickstart/best.safetensors --cam cam.png"

_PICTURES = 24
_CSV_HEAD = ("image", "place", "class", "name", "confidence", "error")
_HEAT, _STRENGTH = "inferno", 0.6


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", type=nonempty_path, metavar="IMAGE", help="files or folders")
    add("--model", help="architecture; not needed for a checkpoint of train_cls.py")
    add("--checkpoint", **FILE, help="weights")
    add("--pretrained", action="store_true", help="download the weights published for --model")
    add("--labels", **FILE, help="class names: one per line, or JSON")
    add("--topk", type=whole(1), default=5, metavar="N", help="classes to show per image (5)")
    add("--csv", **FILE, help="write a row for each predicted class")
    add("--json", **FILE, help="write an entry for each image")
    text = f"draw the first {_PICTURES} images with their Grad-CAM"
    add("--cam", type=nonempty_path, metavar="PNG", help=text)
    add("--batch-size", type=whole(1), default=16, metavar="N", help="images per batch (16)")
    text = "fuse the model and compute in this dtype (default: not fused)"
    add("--dtype", choices=DTYPES, help=text)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    add_overwrite(parser)


def run(options: Namespace) -> int:
    """Run ``predict``; 1 if an image could not be read."""
    if options.cam is not None:
        required("matplotlib", "--cam")
    device = usable_device(options.device)
    if options.dtype is not None:
        if options.cam is not None:
            raise CommandError("--cam needs the layers before fuse(): leave out --dtype")
        options.dtype = check_dtype(options.dtype, device)
    found, skipped = find_images(options.images)
    require_writable(
        {
            "--csv": (options.csv, csv_of(*_CSV_HEAD)),
            "--json": (options.json, json_of("images")),
            "--cam": (options.cam, FIGURE),
        },
        [options.checkpoint, options.labels, *options.images, *found],
        options.overwrite,
    )
    loaded = load(options.model, options.checkpoint, options.pretrained)
    if options.checkpoint is None and not options.pretrained:
        sys.stderr.write(
            f"note: without --checkpoint or --pretrained, {loaded.name} is untrained; its "
            "predictions are random\n"
        )
    if not loaded.model.num_classes:
        raise CommandError(f"{loaded.name} has no classifier; predict needs one")
    if options.labels is not None:
        loaded.classes = read_labels(options.labels, loaded.model.num_classes)
    if (channels := channels_of(loaded.model)) not in (1, 3):
        raise CommandError(
            f"{loaded.name} expects {channels} channels; images are read as RGB or grey"
        )
    if options.cam is not None:
        if not isinstance(loaded.model, StagedBackbone):
            raise CommandError(f"--cam needs a model of this library, not {loaded.name}")
        if loaded.model.fused:
            raise CommandError(f"--cam needs weights from before fuse(), not {options.checkpoint}")
    loaded.model.to(device)
    if options.dtype is not None:
        fuse(loaded.model, dtype=COMPUTED[options.dtype])

    pictures = _PICTURES if options.cam is not None else 0
    predictions = [*predict(loaded, found, options.topk, options.batch_size, pictures)]
    names = loaded.classes or [str(number) for number in range(loaded.model.num_classes)]
    sys.stdout.write(_as_table(predictions, names))
    write_if_asked(options.csv, _as_csv(predictions, names))
    write_if_asked(options.json, json_text({"images": _as_entries(predictions, names)}))
    if options.cam is not None:
        shown = [prediction for prediction in predictions if prediction.heat is not None]
        if shown:
            _draw_predictions(options.cam, shown, names)
    if skipped:
        sys.stderr.write(f"{skipped}\n")
    unreadable = [prediction for prediction in predictions if prediction.error]
    for prediction in unreadable:
        sys.stderr.write(f"cannot read {one_line(str(prediction.path))}: {prediction.error}\n")
    if unreadable:
        sys.stderr.write(f"{len(unreadable)} of {len(predictions)} images could not be read\n")
    return 1 if unreadable else 0


@dataclass
class Prediction:
    """A model's prediction for one image."""

    path: Path
    ranked: Sequence[tuple[int, float]] = ()  # class and confidence, the most likely first
    error: str = ""  # why the image could not be read
    image: Any = None  # (C, H, W) in uint8, as resized for the model; only for pictures, like:
    heat: Any = None  # (H, W) in 0 … 1, see :func:`backbones.cli.cam.grad_cam`


def predict(
    loaded: Loaded, paths: Sequence[Path], topk: int = 5, batch_size: int = 16, pictures: int = 0
) -> Iterator[Prediction]:
    """Predictions in the order of ``paths``.

    The first ``pictures`` readable images are returned with their pixels and Grad-CAM.
    """
    resize = Resizing(preprocessing(loaded))
    with counting("images", len(paths), shown=len(paths) > batch_size) as bar:
        for start in range(0, len(paths), batch_size):
            batch = [Prediction(path) for path in paths[start : start + batch_size]]
            for prediction in batch:
                prediction.image, prediction.error = resize.read(prediction.path)
            readable = [prediction for prediction in batch if not prediction.error]
            if readable:
                normalised = resize.normalise(np.stack([p.image for p in readable]))
                _classify(loaded.model, normalised, readable, topk, pictures)
            for prediction in readable[pictures:]:
                prediction.image = None
            pictures = max(0, pictures - len(readable))
            yield from batch
            bar.step(count=len(batch))


def find_images(places: Sequence[Path]) -> tuple[list[Path], images.Skipped]:
    """The given files and the images in the given folders (recursively, sorted), and other files.

    Non-images with an image's name (a named pipe, a broken link) are included; reading them fails
    with an explanation.
    """
    found: list[Path] = []
    skipped = images.Skipped()
    for place in places:
        if place.is_dir():
            inside, others = images.list_below(place)
            if not inside:
                raise CommandError(f"no images in {place}")
            found += (place / name for name in inside)
            skipped.add([str(place / name) for name in others])
        elif os.path.lexists(place):
            found.append(place)
        else:
            raise FileNotFoundError(f"no image at {place}")
    return found, skipped


def _classify(
    model: Any, batch: Tensor, predictions: Sequence[Prediction], topk: int, pictures: int
) -> None:
    """Fill in the ranks of ``predictions`` and, for the first ``pictures``, the heat."""
    parameter = next(model.parameters())
    if pictures:
        logits, heat = grad_cam(model, batch.to(parameter.device))
        for prediction, found in zip(predictions[:pictures], heat.cpu().numpy(), strict=False):
            prediction.heat = found
    else:
        with torch.inference_mode():
            logits = model(batch.to(parameter.device, parameter.dtype))
    finite = logits.isfinite().all(1).tolist()
    if not all(finite):
        raise CommandError(
            f"the model's output for {predictions[finite.index(False)].path} is not finite"
        )
    best = logits.float().softmax(1).cpu().topk(min(topk, logits.shape[1]), dim=1)
    ranks = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    for prediction, (classes, confidences) in zip(predictions, ranks, strict=True):
        prediction.ranked = list(zip(classes, confidences, strict=True))


def _as_table(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """A text table, without unreadable images."""
    rows = [
        [one_line(str(p.path)) if not place else "", names[number], f"{100 * confidence:.1f} %"]
        for p in predictions
        for place, (number, confidence) in enumerate(p.ranked)
    ]
    return table(("image", "class", "confidence"), rows, left=2) if rows else ""


def _as_csv(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """CSV with a row for each predicted class and for each unreadable image."""
    rows: list[tuple[Any, ...]] = []
    for p in predictions:
        if p.error:
            rows.append((p.path, "", "", "", "", p.error))
        for place, (number, confidence) in enumerate(p.ranked, start=1):
            rows.append((p.path, place, number, names[number], f"{confidence:.6f}", ""))
    return csv_text(_CSV_HEAD, rows)


def _as_entries(predictions: Sequence[Prediction], names: Sequence[str]) -> list[dict[str, Any]]:
    """An entry for each image, for JSON."""
    entries: list[dict[str, Any]] = []
    for p in predictions:
        if p.error:
            entries.append({"image": str(p.path), "error": p.error})
            continue
        ranked = [{"class": n, "name": names[n], "confidence": round(c, 6)} for n, c in p.ranked]
        entries.append({"image": str(p.path), "predictions": ranked})
    return entries


def _draw_predictions(path: Path, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """Draw each image next to a copy with its heat map, with the top predictions below."""
    from matplotlib import colormaps

    columns = min(4, len(predictions))
    rows = -(-len(predictions) // columns)
    width, height = 3.1 * columns + 0.2, 2.25 * rows + 0.15
    figure = new_figure(width, height)
    edges = {"left": 0.1 / width, "right": 1 - 0.1 / width}
    edges |= {"bottom": 0.5 / height, "top": 1 - 0.32 / height}
    figure.subplots_adjust(**edges, wspace=0.06, hspace=0.5)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, prediction in zip(axes, predictions, strict=False):
        heat = prediction.heat[..., None]
        colors = colormaps[_HEAT](heat[..., 0])[..., :3]
        image = np.broadcast_to(prediction.image.transpose(1, 2, 0) / 255, colors.shape)
        shown = image * (1 - _STRENGTH * heat) + colors * _STRENGTH * heat
        gap = np.ones((len(heat), max(1, len(heat) // 40), 3))
        axis.imshow(np.concatenate((image, gap, shown), axis=1))
        name = prediction.path.name
        title = drawable(name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}")
        axis.set_title(title, fontsize=9, loc="left", pad=3, color="#56606e")
        for i, (number, confidence) in enumerate(prediction.ranked[:2]):
            line = f"{short(names[number])}  {100 * confidence:.0f} %"
            font = {"fontsize": 8.5} if i else {"fontsize": 10, "fontweight": "bold"}
            place = {"transform": axis.transAxes, "va": "top"}
            axis.text(0, -0.03 - 0.13 * i, line, color=INK, **place, **font)
    save_figure(figure, path)
