"""The record of a run: metrics, metrics.jsonl, summary.csv, TensorBoard, W&B, lines of text."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.common.errors import FileError, RecipeError
from backbones.common.files import write_problem, write_text_atomically
from backbones.common.messages import first_line
from backbones.common.outputs import csv_of_rows
from backbones.common.progress import Progress
from backbones.training.recipe import Recipe

RESULTS = {
    "best.safetensors": "the weights of the best epoch",
    "last.pt": "the state for --resume; weights under `model`",
    "summary.csv": "a row per epoch",
    "metrics.jsonl": "an entry every few updates",
    "curves.png": "loss and accuracy",
    "predictions.png": "validation images, predictions and labels",
    "comparison.png": "a validation image: input, result and ground truth",
    "config.yaml": "the recipe, fully resolved",
    "bad_batches.txt": "images whose loss was not finite",
    "corrupt_train.txt": "unreadable training images",
    "corrupt_validation.txt": "unreadable validation images",
}
"""The files of runs, of classifiers and of restoration models, with descriptions."""


def count_batch(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """A batch's sums (4,): loss, the images whose best or best five classes are right, and images.

    Logits are (B, classes), labels (B,), or (B, classes) of 0 and 1; then the second sum is of the
    fractions of right binary decisions. Images with negative labels are not counted.
    """
    if labels.ndim == 2:
        counted = labels[:, 0] >= 0
        share = ((logits > 0) == (labels > 0)).double().mean(dim=1)
        counts = torch.stack([(share * counted).sum(), share.new_zeros(()), counted.sum()])
    else:
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        counts = torch.stack([right[:, 0].sum(), right.sum(), (labels >= 0).sum()])
    return torch.cat([loss_sum.view(1), counts])


def means_of(sums: Tensor, factors: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """The means of the first ``sums``, times ``factors``, by name; the last is of the images."""
    *totals, count = sums.tolist()
    named = zip(factors.items(), totals, strict=False)
    return {prefix + name: factor * total / max(count, 1.0) for (name, factor), total in named}


def validation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a validation batch, summed over its images.

    Logits are (B, classes), labels (B,), or (B, classes) of 0 and 1; negative ones are ignored.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    counted = labels[:, 0] >= 0
    target = labels.clamp(min=0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
    return (losses * counted).sum()


def mean_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, averaged over the classes, MedMNIST's metric.

    Scores are (N, classes), any increasing function of the probability, labels (N, classes) of 0
    and 1. Classes with only positive or only negative images are ignored; NaN if none are left.
    """
    areas = []
    for score, label in zip(scores.double().T, labels.T, strict=True):
        positive, negative = score[label > 0], score[label <= 0].sort().values
        if len(positive) and len(negative):
            # How many negatives each positive exceeds; equal scores are half.
            below, above = (torch.searchsorted(negative, positive, right=r) for r in (False, True))
            areas.append(float((below + above).sum()) / (2 * len(positive) * len(negative)))
    return sum(areas) / len(areas) if areas else float("nan")


class RunLog:
    """The files that record a run; nothing is written unless ``active``, in the main process.

    ``metrics.jsonl`` (an entry every ``log_every`` updates and every epoch) and ``summary.csv`` (a
    row an epoch); on request also reports to TensorBoard and W&B.
    """

    def __init__(self, folder: Path, recipe: Recipe, active: bool) -> None:
        self.folder, self.active, self.recipe = folder, active, recipe
        self._board: Any = None
        self._wandb: Any = None
        self._writer = self._reporter = None
        if active and recipe.tensorboard:
            self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        if active and recipe.wandb:
            self._reporter = _module("wandb", "wandb")

    def open(self) -> None:
        """Start reporting to TensorBoard and W&B."""
        if self._writer is not None:
            self._board = self._writer(str(self.folder))
        if self._reporter is not None:
            self._wandb = _start_wandb(self._reporter, self.folder, self.recipe)

    def rewind(self, updates: int, history: Sequence[dict[str, Any]]) -> None:
        """Truncate the files to ``updates``; a resumed run repeats the rest.

        A run can be killed between saving an epoch and recording it, or in the middle of a line.
        """
        path = self.folder / "metrics.jsonl"
        if not self.active or not path.exists():
            return
        written: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                written.append(json.loads(line))
        entries = [e for e in written if e["update"] <= updates and "train_loss" not in e]
        entries += map(_rounded, history)
        entries.sort(key=lambda entry: entry["update"])  # stable: an epoch's row is the last
        write_text_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self.summarize(history)

    def add(self, entry: dict[str, Any]) -> None:
        """Append one entry; it needs the key ``update``."""
        if not self.active:
            return
        entry = _rounded(entry)
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise FileError(f"cannot write {path}: {write_problem(error, self.folder)}") from error
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float)) and k != "update"}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, entry["update"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=entry["update"])

    def summarize(self, history: Sequence[dict[str, Any]]) -> None:
        """Rewrite ``summary.csv``: one row for each epoch."""
        if not self.active or not history:
            return
        rows = [_rounded(row) for row in history]
        write_text_atomically(self.folder / "summary.csv", csv_of_rows(rows))

    def close(self) -> None:
        """Flush the loggers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def say_results(progress: Progress, folder: Path) -> None:
    """List the files of a finished run."""
    progress.say(f"in {folder}:")
    for name, meaning in RESULTS.items():
        if (folder / name).exists():
            progress.say(f"  {name:<18} {meaning}")


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RecipeError(f"{package} is missing: pip install {package}") from None


def _start_wandb(wandb: Any, folder: Path, recipe: Recipe) -> Any:
    options = {"project": recipe.wandb, "config": vars(recipe), "resume": "allow"}
    try:
        return wandb.init(name=folder.name, id=folder.name, dir=str(folder), **options)
    except Exception as error:  # the network, an account, a name: it has errors of its own for each
        raise RecipeError(f"wandb rejected the run: {first_line(error)}") from error
