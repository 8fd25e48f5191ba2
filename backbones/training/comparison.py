"""A trained classifier before and after ``fuse()``: its accuracy, and the time of an image."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import backbones
from backbones.common.progress import Progress
from backbones.common.signals import StopRequest
from backbones.common.tables import table
from backbones.training.record import count_batch, mean_auc, means_of
from ops import cpu

_MOST_IMAGES = 2000
_WARM_UP = 5  # calls; in the first ones, a fused model compiles and chooses kernels, and records


@dataclass
class Form:
    """A form of the network, and what its calls with an image each gave and took."""

    model: Any
    logits: list[Tensor] = field(default_factory=list)  # of (1, classes)
    seconds: list[float] = field(default_factory=list)

    def call(self, image: Tensor) -> None:
        """Compute and time an image (1, C, H, W)."""
        start = time.perf_counter()
        logits = self.model(image)
        self.seconds.append(time.perf_counter() - start)
        self.logits.append(logits.float())

    @property
    def milliseconds(self) -> float:
        """The median of the calls."""
        return 1e3 * statistics.median(self.seconds)

    def score(self, labels: Tensor) -> float:
        """Top-1 accuracy, or the AUC of several labels (N, classes) per image, in per cent."""
        logits = torch.cat(self.logits)
        if labels.ndim == 2:
            return 100 * mean_auc(logits, labels)
        sums = count_batch(torch.zeros(()), logits, labels)
        return means_of(sums, {"loss": 1.0, "top1": 100.0})["top1"]


@dataclass
class Comparison:
    """The result of :func:`compare`."""

    plain: Form
    fused: Form
    labels: Tensor  # (N,), or (N, classes) of 0 and 1
    kernels: str  # which the fused form had

    def report(self, processor: str) -> str:
        """A table, and what it was measured on: ``processor`` is its name."""
        before = self.plain.milliseconds
        kind = "AUC" if self.labels.ndim == 2 else "accuracy"
        rows = [
            [
                name,
                f"{form.score(self.labels):.2f} %",
                f"{form.milliseconds:.2f}",
                f"{before / form.milliseconds:.2f}×",
            ]
            for name, form in (("plain", self.plain), ("fused", self.fused))
        ]
        return (
            f"{table(['network', kind, 'ms per image', 'speed'], rows)}"
            f"{len(self.labels)} validation images in float32; median time of one image on one "
            f"thread of {processor};\n{self.kernels}"
        )


def compare(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    progress: Progress,
    stop: StopRequest,
) -> Comparison | None:
    """Run a model and its fused copy on validation images, one at a time, on one CPU thread.

    Both compute each image in turn, so that other processes slow down both.

    Args:
        model: in eval mode and float32; it is moved to the CPU.
        batches: images (B, C, H, W) and labels (B,) or (B, classes); negative ones mean none.
        count: approximate number of images. Of more than 2000, every n-th is taken.
        progress, stop: of the run.

    Returns:
        The comparison; None after a signal.
    """
    model = model.cpu()
    plain, fused = Form(model), Form(backbones.fuse(copy.deepcopy(model)))
    labels: list[Tensor] = []
    progress.begin("plain and fused", min(count, _MOST_IMAGES))
    with _one_thread(), torch.inference_mode():
        for image, label in _single(batches, every=-(-count // _MOST_IMAGES)):
            if not labels:
                for form in (plain, fused):
                    for _ in range(_WARM_UP):
                        form.model(image)
            if stop.signal:
                return None
            order = (plain, fused) if len(labels) % 2 else (fused, plain)
            for form in order:
                form.call(image)
            labels.append(label)
            progress.step()
    if not labels:
        raise ValueError("there are no validation images with labels")
    return Comparison(plain, fused, torch.cat(labels), _kernels())


def _single(
    batches: Iterable[tuple[Tensor, Tensor]], every: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every n-th image that has a label, (1, C, H, W), with that; both on the CPU."""
    number = 0
    for images, labels in batches:
        for i in range(len(labels)):
            if labels[i].min() >= 0:
                if number % every == 0:
                    yield images[i : i + 1].cpu(), labels[i : i + 1].cpu()
                number += 1


def _kernels() -> str:
    """Which compiled kernels fused models have here, or why they have none."""
    state = cpu.status("gemm")
    if state.reason is not None:
        return f"fused without compiled kernels, which would be faster: {state.reason}"
    return f"fused with kernels compiled for {state.instruction_set}"


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
