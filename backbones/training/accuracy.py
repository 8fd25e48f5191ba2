"""Predictions of a classifier on a data set, and their accuracy."""

from __future__ import annotations

import importlib.resources
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from backbones.common.errors import DataError
from backbones.data.sources import ImageSource
from backbones.training.loader import ValidationLoader
from backbones.training.record import validation_loss

_IMAGENET_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass
class Predictions:
    """Predictions for all readable images, in the order of the data."""

    top5: np.ndarray  # (N, ≤ 5) classes, the most likely first
    labels: np.ndarray  # (N,) ground truth
    indices: np.ndarray  # (N,) index of each image in the data
    loss: float  # mean cross-entropy
    seconds: float  # of the whole pass

    def accuracy(self, k: int) -> float:
        """Top-``k`` accuracy in percent."""
        return 100 * float((self.top5[:, :k] == self.labels[:, None]).any(1).mean())


@torch.inference_mode()
def predict_all(
    model: nn.Module, loader: ValidationLoader, amp: str | None, show: Callable[[int], object]
) -> Predictions:
    """Run ``model``, in eval mode, over every image; ``show`` gets the number of done batches."""
    device = loader.world.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp or "")
    own = next((p.dtype for p in model.parameters()), torch.float32)
    tops, targets, losses, begun = [], [], [], time.monotonic()
    for number, (images, labels) in enumerate(loader):
        if labels.ndim == 2:
            raise DataError("accuracy is not defined for images with several labels")
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(images.to(own)).float()  # (B, classes)
        tops.append(logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu())
        losses.append(validation_loss(logits, labels).cpu())
        targets.append(labels.cpu())
        show(number + 1)
    top5, truth = torch.cat(tops).numpy(), torch.cat(targets).numpy()
    indices = np.flatnonzero(truth >= 0)
    loss = float(torch.stack(losses).sum()) / max(len(indices), 1)
    return Predictions(top5[indices], truth[indices], indices, loss, time.monotonic() - begun)


def read_real_labels(path: str) -> list[list[int]]:
    """The acceptable classes of each of ImageNet's validation images; timm's copy for ""."""
    try:
        timms = importlib.resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
        labels = json.loads((Path(path) if path else timms).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read real labels {path}: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(entry, list) for entry in labels):
        raise DataError(f"{path}: real labels must be a list with a list of classes for each image")
    return labels


def real_accuracy(predictions: Predictions, source: ImageSource, real: list[list[int]]) -> float:
    """Top-1 accuracy in percent on the images that have reassessed labels."""
    right = []
    for index, predicted in zip(
        predictions.indices.tolist(), predictions.top5[:, 0].tolist(), strict=True
    ):
        found = _IMAGENET_NAME.search(source.name(index))
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(real):
            raise DataError(
                f"real labels need images ILSVRC2012_val_00000001.JPEG … {len(real):08d}.JPEG, "
                f"got {source.name(index)}"
            )
        if real[number - 1]:
            right.append(predicted in real[number - 1])
    return 100 * sum(right) / max(len(right), 1)
