"""The pictures of a run: curves of loss and accuracy, and predictions for some images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backbones.common.figures import GRID, INK, drawable, new_figure, save_figure, short, style_axis

_TRAIN, _VALIDATION, _AVERAGE = "#8a94a6", "#1f5fbf", "#d9822b"
_RIGHT, _WRONG = "#2e7d4f", "#c62828"


@dataclass
class Prediction:
    """A validation image with its prediction.

    Attributes:
        image: (H, W, 3) in 0..1.
        truth, answer: class indices of label and prediction.
        confidence: probability of ``answer``.
    """

    image: np.ndarray
    truth: int
    answer: int
    confidence: float


@torch.inference_mode()
def pick_predictions(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    config: dict[str, Any],
    autocast: Callable[[], Any],
) -> list[Prediction]:
    """Choose 32 of about 2000 images to show: at most 8 mistakes, the most confident first.

    Args:
        batches: images (B, C, H, W), normalised with the ``mean`` and ``std`` of ``config``, and
            labels (B,).
        autocast: creates the context to call the model in.
    """
    right: list[Prediction] = []
    wrong: list[Prediction] = []
    for images, labels in batches:
        with autocast():
            confidence, answers = model(images).float().softmax(dim=1).max(dim=1)
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        pixels = (images.cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for i, truth in enumerate(labels.tolist()):
            if truth < 0:
                continue
            item = Prediction(pixels[i], truth, int(answers[i]), float(confidence[i]))
            (right if item.answer == truth else wrong).append(item)
        if len(right) + len(wrong) >= 2000:
            break
    wrong.sort(key=lambda item: -item.confidence)
    chosen = wrong[:8]
    positions = np.linspace(0, max(len(right) - 1, 0), min(32 - len(chosen), len(right)))
    return chosen + [right[int(position)] for position in positions]


def draw_curves(path: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """Draw loss and top-1 accuracy over the epochs, from the rows of ``summary.csv``."""
    figure = new_figure(10.5, 4.2)
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.13, top=0.9, wspace=0.18)
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("loss", "top1"), ("loss", "accuracy, %"), strict=True):
        for prefix, name, color in (
            ("train", "training, augmented", _TRAIN),
            ("val", "validation", _VALIDATION),
            ("ema", "validation, averaged weights", _AVERAGE),
        ):
            points = [
                (row["epoch"] + 1, row[f"{prefix}_{key}"])
                for row in history
                if row.get(f"{prefix}_{key}") is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                mark = "o" if len(points) <= 40 else None
                axis.plot(x, y, color=color, label=name, linewidth=2, marker=mark, markersize=4)
        style_axis(axis, label)
    axes[1].axhline(100, color=GRID, linewidth=1)
    _mark_best(axes[1], history)
    axes[0].legend(frameon=False, fontsize=10, labelcolor=INK)
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    save_figure(figure, path)


def draw_predictions(
    path: Path, shown: Sequence[Prediction], classes: Sequence[str], title: str
) -> None:
    """Draw a grid of images with prediction and confidence; mistakes are highlighted."""
    columns = min(8, max(4, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    # Long names leave no room for the confidence.
    long = max(len(name) for name in classes) > 6
    width, height = 1.62 * columns + 0.3, (2.3 if long else 2.1) * rows + 0.55
    figure = new_figure(width, height)
    figure.subplots_adjust(
        left=0.15 / width,
        right=1 - 0.15 / width,
        bottom=0.35 / height,
        top=1 - (0.95 if long else 0.8) / height,
        wspace=0.08,
        hspace=0.48 if long else 0.34,
    )
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, item in zip(axes, shown, strict=False):
        right = item.truth == item.answer
        color = _RIGHT if right else _WRONG
        axis.imshow(item.image, interpolation="nearest")
        axis.set_axis_on()
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_edgecolor(color)
            spine.set_linewidth(1.0 if right else 3.5)
        mark = "✓" if right else "✗"
        sure = f"{100 * item.confidence:.0f} %"
        answer = f"{mark} {short(classes[item.answer])}{chr(10) if long else '  '}{sure}"
        truth = f"truth: {short(classes[item.truth])}"
        weight = "normal" if right else "bold"
        axis.set_title(answer, fontsize=10 if long else 11, color=color, pad=4, fontweight=weight)
        axis.set_xlabel(
            truth, fontsize=9 if long else 9.5, color=INK if right else _WRONG, labelpad=3
        )
    if shown and shown[0].answer != shown[0].truth:
        title += ", mistakes first"
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    save_figure(figure, path)


def _mark_best(axis: Any, history: Sequence[dict[str, Any]]) -> None:
    points = [
        (row[key], row["epoch"] + 1)
        for row in history
        for key in ("val_top1", "ema_top1")
        if row.get(key) is not None
    ]
    if not points:
        return
    accuracy, epoch = max(points, key=lambda point: point[0])
    axis.plot(epoch, accuracy, "o", color=INK, markersize=7, fillstyle="none", markeredgewidth=1.6)
    text = f"best {accuracy:.1f} %, epoch {epoch}"
    axis.set_title(text, loc="right", fontsize=11, color=INK)
