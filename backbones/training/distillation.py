"""Distillation from a teacher: soft or hard labels, and One-for-All with early exits.

Soft labels: https://arxiv.org/abs/1503.02531. Hard labels: https://arxiv.org/abs/2012.12877.
One-for-All (OFA-KD), for heterogeneous architectures: https://arxiv.org/abs/2310.19444; written
from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from backbones.common.errors import RecipeError
from backbones.core.base import StagedBackbone
from backbones.training.recipe import Recipe
from backbones.training.trained import load_trained
from ops.batch_norm import BatchNorm2d

Loss = Callable[[Tensor, Tensor], Tensor]


def soft_label_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the softened predictions; logits (B, classes).

    Times the temperature squared, so that gradients have the scale of cross-entropy at any.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def hard_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's most likely class; logits (B, classes)."""
    return F.cross_entropy(student, teacher.argmax(dim=1))


def ofa_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""Distillation with adaptive target enhancement, equation 4 of OFA-KD.

    With :math:`p` the probabilities, s the student, t the teacher and ĉ the true class,

    .. math:: -(1 + p^t_ĉ)^γ \log p^s_ĉ - \sum_{c ≠ ĉ} p^t_c \log p^s_c

    The true class is weighted by the teacher's confidence in it; for γ = 1, this is the sum of the
    cross-entropies with the label and with the teacher.

    Args:
        student, teacher: logits (B, classes).
        labels: classes (B,), or their weights (B, classes) after mixup; the loss is then the
            weighted mean over the labels.
        gamma: ≥ 1.
        temperature: of both predictions; the paper uses 1.
    """
    if labels.ndim == 1:
        labels = F.one_hot(labels, student.shape[1])
    truth = labels.to(student.dtype)
    p = torch.softmax(teacher / temperature, dim=1)
    weights = truth * (1 + p) ** gamma + (1 - truth) * p  # (B, classes)
    log_p = F.log_softmax(student / temperature, dim=1)
    return -(weights * log_p).sum(dim=1).mean() * temperature**2


class Exit(nn.Module):
    """An early exit, only used in training, that maps a stage's output to logits.

    Depthwise-separable convolutions (at least one) halve the map down to the resolution of the
    student's last one, followed by mean, norm and a linear layer: (B, in_chs, H, W) →
    (B, num_classes). ``out_chs`` are the channels of the student's last stage.
    """

    def __init__(self, in_chs: int, out_chs: int, halvings: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        steps, stride = max(halvings, 1), 2 if halvings else 1
        for step in range(steps):
            # Widths grow geometrically from the stage's to the last stage's.
            width = round(in_chs * (out_chs / in_chs) ** ((step + 1) / steps))
            layers += [
                nn.Conv2d(in_chs, in_chs, 3, stride, padding=1, groups=in_chs, bias=False),
                BatchNorm2d(in_chs),
                nn.Conv2d(in_chs, width, 1, bias=False),
                BatchNorm2d(width),
                nn.GELU(),
            ]
            in_chs = width
        self.project = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(out_chs)
        self.fc = nn.Linear(out_chs, num_classes)
        trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.project(x).mean((2, 3))))


class StudentWithExits(nn.Module):
    """A backbone with exits after some ``stages``: images → logits, and the logits of each exit."""

    def __init__(self, student: Any, stages: Sequence[int] | None = None) -> None:
        super().__init__()
        if not isinstance(student, StagedBackbone):
            raise RecipeError(
                f"distill: ofa needs a student of this library, not {type(student).__name__}"
            )
        ends = student.stage_features()
        count = len(ends)
        selected = range(count) if stages is None else stages
        chosen = sorted({i + count if i < 0 else i for i in selected})
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise RecipeError(
                f"ofa_stages must name some of the stages 0 … {count - 1}, not {tuple(selected)}"
            )
        self.student = student
        self.indices = [ends[i] for i in chosen]
        info, last = student.feature_info, student.feature_info[-1]
        self.exits = nn.ModuleList(
            Exit(
                info[i]["num_chs"],
                last["num_chs"],
                round(math.log2(last["reduction"] / info[i]["reduction"])),
                student.num_classes,
            )
            for i in self.indices
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        last, maps = self.student.forward_intermediates(x, indices=self.indices)
        logits = self.student.forward_head(last)
        return logits, [branch(m) for branch, m in zip(self.exits, maps, strict=True)]


class Teacher(nn.Module):
    """A frozen network that receives the student's batches in its own normalisation and size.

    ``student`` and ``teacher`` are mean and std of their images; ``img_size`` is the teacher's.
    """

    def __init__(
        self,
        network: nn.Module,
        student: tuple[Sequence[float], Sequence[float]],
        teacher: tuple[Sequence[float], Sequence[float]],
        img_size: int | None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.img_size = img_size
        means, stds = (
            [torch.tensor(v).view(1, -1, 1, 1) for v in pair]
            for pair in zip(student, teacher, strict=True)
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", stds[0] / stds[1])
        self.register_buffer("shift", (means[0] - means[1]) / stds[1])

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing, since the teacher is frozen."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = images * self.scale + self.shift
        if self.img_size is not None and images.shape[-1] != self.img_size:
            images = F.interpolate(
                images, size=self.img_size, mode="bicubic", antialias=True, align_corners=False
            )
        return self.network(images).float()


class Objective:
    """The loss of the labels, or with a teacher (1 - alpha) · labels + alpha · teacher.

    Losses of auxiliary heads, whose logits the network returns after its own, are added with
    ``aux_weight``. For ``ofa``, the student returns its logits and a list of the exits' logits, and
    the losses of all of them are added.
    """

    def __init__(self, labels_loss: Loss, recipe: Recipe, teacher: Teacher | None = None) -> None:
        self.labels_loss, self.recipe, self.teacher = labels_loss, recipe, teacher

    def __call__(self, net: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits (B, classes) of ``net``."""
        recipe, output = self.recipe, net(images)
        exits: Sequence[Tensor] = ()
        if recipe.distill == "ofa":
            output, exits = output
        heads = output if isinstance(output, tuple) else (output,)
        logits, *auxiliary = (head.float() for head in heads)
        loss = self.labels_loss(logits, targets)
        for head in auxiliary:
            loss = loss + recipe.aux_weight * self.labels_loss(head, targets)
        if self.teacher is None:
            return loss, logits
        taught, temperature = self.teacher(images), recipe.distill_temperature
        if recipe.distill == "ofa":
            options = (taught, targets, recipe.ofa_gamma, temperature)
            losses = [ofa_loss(branch.float(), *options) for branch in (logits, *exits)]
            distilled = torch.stack(losses).sum()
        elif recipe.distill == "hard":
            distilled = hard_label_loss(logits, taught)
        else:
            distilled = soft_label_loss(logits, taught, temperature)
        return (1 - recipe.distill_alpha) * loss + recipe.distill_alpha * distilled, logits


def build_teacher(recipe: Recipe, num_classes: int, config: dict[str, Any]) -> Teacher:
    """The recipe's teacher; ``config`` has the ``mean`` and ``std`` of the student's images."""
    weights = recipe.teacher_checkpoint, num_classes, recipe.in_chans
    network = load_trained(recipe.teacher or "", *weights, recipe.teacher_args)
    own = dict(getattr(network, "pretrained_cfg", None) or {})
    stats = own.get("mean", config["mean"]), own.get("std", config["std"])
    if len(stats[0]) != recipe.in_chans:
        stats = config["mean"], config["std"]
    size = recipe.teacher_img_size
    if size is None and own.get("fixed_input_size"):
        size = own["input_size"][-1]
    return Teacher(network, (config["mean"], config["std"]), stats, size)
