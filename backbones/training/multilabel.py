"""Multi-label classification, for example of chest X-rays: each class is a binary decision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def validation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a validation batch, summed over its images.

    Cross-entropy or, for multi-label data, binary cross-entropy averaged over the classes.

    Args:
        logits: (B, classes).
        labels: (B,), or (B, classes) of 0 and 1; images with negative labels are ignored.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    counted = labels[:, 0] >= 0
    target = labels.clamp(min=0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
    return (losses * counted).sum()


def mean_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, averaged over the classes, MedMNIST's metric.

    The fraction of pairs of a positive and a negative image that the scores order correctly; ties
    count half.

    Args:
        scores: (N, classes), any increasing function of the probability.
        labels: (N, classes) of 0 and 1.

    Returns:
        0 … 1; classes with only positive or only negative images are ignored; NaN if none are left.
    """
    areas = []
    for score, label in zip(scores.double().T, labels.T, strict=True):
        positives = int((label > 0).sum())
        negatives = len(label) - positives
        if positives and negatives:
            _, place, counts = torch.unique(score, return_inverse=True, return_counts=True)
            ends = counts.cumsum(0).double()
            ranks = (ends - (counts - 1) / 2)[place]  # from 1; equal scores share the mean rank
            wins = ranks[label > 0].sum() - positives * (positives + 1) / 2
            areas.append(float(wins) / (positives * negatives))
    return sum(areas) / len(areas) if areas else float("nan")
