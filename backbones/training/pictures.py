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
    """A validation image with its prediction."""

    image: np.ndarray  # (H, W, 3) in 0 … 1
    truth: int
    answer: int
    confidence: float  # probability of ``answer``


@torch.inference_mode()
def pick_predictions(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    config: dict[str, Any],
    autocast: Callable[[], Any],
) -> list[Prediction]:
    """Choose 32 of about 2000 images to show: at most 8 mistakes, the most confident first.

    ``config`` has the ``mean`` and ``std`` that the images (B, C, H, W) are normalised with.
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
    figure.set_layout_engine("constrained")
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
    scores = [
        (row[key], row["epoch"] + 1)
        for row in history
        for key in ("val_top1", "ema_top1")
        if row.get(key) is not None
    ]
    if scores:
        accuracy, epoch = max(scores, key=lambda score: score[0])
        axes[1].plot(epoch, accuracy, "o", color=INK, markersize=7, fillstyle="none")
        text = f"best {accuracy:.1f} %, epoch {epoch}"
        axes[1].set_title(text, loc="right", fontsize=11, color=INK)
    axes[0].legend(frameon=False, fontsize=10, labelcolor=INK)
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    save_figure(figure, path)


def draw_predictions(
    path: Path, shown: Sequence[Prediction], classes: Sequence[str], title: str
) -> None:
    """Draw a grid of images with prediction and confidence; mistakes are highlighted."""
    columns = min(8, max(4, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    long = max(len(name) for name in classes) > 6  # they leave no room for the confidence
    figure = new_figure(1.62 * columns + 0.3, (2.25 if long else 2.05) * rows + 0.55)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, item in zip(axes, shown, strict=False):
        right = item.truth == item.answer
        color, weight = (_RIGHT, "normal") if right else (_WRONG, "bold")
        axis.imshow(item.image, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(edgecolor=color, linewidth=1.0 if right else 3.5)
        mark, sure = "✓" if right else "✗", f"{100 * item.confidence:.0f} %"
        answer = f"{mark} {short(classes[item.answer])}{chr(10) if long else '  '}{sure}"
        axis.set_title(answer, fontsize=10, color=color, fontweight=weight)
        truth = f"truth: {short(classes[item.truth])}"
        axis.set_xlabel(truth, fontsize=9, color=INK if right else _WRONG)
    if shown and shown[0].answer != shown[0].truth:
        title += ", mistakes first"
    figure.suptitle(drawable(title), x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    save_figure(figure, path)
