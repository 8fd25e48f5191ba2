"""The network that `embed` runs: a model with weights, fused, that returns features."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.common.dtypes import COMPUTED
from backbones.common.errors import CommandError
from backbones.common.messages import shown
from backbones.common.resizing import Resizing
from backbones.core.base import StagedBackbone
from backbones.core.inputs import channels_of
from backbones.core.loaded import Loaded, fuse, load, preprocessing
from ops.fuse.calls import CALLS_TO_REPLAY

FEATURES = "head, stage:N or stage:N:map"
_WORDS = re.compile(r"head|stage:(-?\d+)(:map)?")


def _stage_of(words: str, model: Any, name: str) -> int | None:
    """The stage that ``words`` choose, as an index of ``forward_intermediates``; None for head."""
    found = _WORDS.fullmatch(words)
    if found is None:
        raise CommandError(f"--features must be {FEATURES}, not {shown(words)}")
    is_ours = isinstance(model, StagedBackbone)
    if is_ours and model.classifier == ():
        raise CommandError(f"{name} restores images and has no features to embed")
    if found[1] is None:
        return None
    if not is_ours and not hasattr(model, "forward_intermediates"):
        raise CommandError(f"--features {words}: timm returns no maps of {name}; use head")
    stages = model.stage_features() if is_ours else range(len(model.feature_info))
    if not 0 <= int(found[1]) < len(stages):
        raise CommandError(
            f"{name} has stages 0 … {len(stages) - 1}, not {words.partition(':')[2]}"
        )
    return int(stages[int(found[1])])


class Network:
    """A model with the weights of a checkpoint, ready to embed images.

    Args:
        model: name; None if the checkpoint contains it.
        features: ``head``, the input of the classifier, or the map of a stage, averaged over height
            and width unless it ends in ``:map``.
        classes: how many of the most likely classes to return; 0 for none.
    """

    def __init__(self, model: str | None, checkpoint: Path, features: str, classes: int) -> None:
        loaded: Loaded = load(model, checkpoint)
        self.name, self.model, self.names = loaded.name, loaded.model, loaded.classes
        self.stage = _stage_of(features, self.model, self.name)
        self.pooled = not features.endswith(":map")
        self.classes = classes
        if classes > self.model.num_classes:
            raise CommandError(
                f"{self.name} has {self.model.num_classes} classes, fewer than the requested "
                f"{classes}"
            )
        if (channels := channels_of(self.model)) not in (1, 3):
            raise CommandError(
                f"{self.name} expects {channels} channels; images are read as RGB or grey"
            )
        self.preprocessing: dict[str, Any] = preprocessing(loaded)
        self.dtype = next(self.model.parameters()).dtype
        self.device = torch.device("cpu")
        if self.stage is None and not classes:
            self.model.reset_classifier(0)  # so that forward, which is replayed, returns features
        blank = torch.zeros(1, *self.preprocessing["input_size"])
        self.shape = tuple(self(blank)[0].shape[1:])  # of an image's embedding

    def prepare(self, computed: str, device: torch.device, batch_size: int) -> None:
        """Prepare to compute batches in a dtype of :data:`COMPUTED`.

        On a CPU, the model is fused, and called until its calls are replayed: the first ones would
        differ in the last digits. On a GPU, it runs with autocast.
        """
        self.dtype, self.device = COMPUTED[computed], device
        if device.type == "cpu":
            fuse(self.model, dtype=self.dtype if self.dtype != torch.float32 else None)
            self.dtype = next(self.model.parameters()).dtype  # of the maps
            size = batch_size, *self.preprocessing["input_size"]
            for call in range(CALLS_TO_REPLAY):
                self(torch.full(size, float(call)))
        else:
            fuse(self.model, channels_last=False)
            self.model.to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings (B, …), and classes and scores (B, classes), of images (B, C, H, W).

        Images are normalised. Embeddings are float32, on the network's device.
        """
        images = images.to(self.device)
        if self.device.type == "cpu":
            return self._compute(images.to(self.dtype))
        reduced = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if reduced else None, enabled=reduced):
            return self._compute(images)

    def of_pixels(
        self, images: Sequence[np.ndarray], resize: Resizing, batch_size: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings (n, dim), classes and scores of images (C, H, W) by ``resize``, on the CPU.

        The fused form of a network depends on the batch size, so a smaller batch is filled up.
        """
        filled = [*images, *[images[-1]] * (batch_size - len(images))]
        found, classes, scores = self(resize.normalise(np.stack(filled)))
        cut = [None if t is None else t[: len(images)].cpu() for t in (classes, scores)]
        return found[: len(images)].flatten(1).cpu(), cut[0], cut[1]

    def _compute(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        model, stage = self.model, self.stage
        classes = scores = None
        if stage is None and not self.classes:
            found = model(images)
        elif stage is None:
            last = model.forward_features(images)
            found = model.forward_head(last, pre_logits=True)
        else:
            kept = not self.classes
            answer = model.forward_intermediates(images, [stage], intermediates_only=kept)
            last, maps = (None, answer) if kept else answer
            found = maps[0]
            if self.pooled:
                found = found.mean((2, 3), dtype=torch.float32)
        if self.classes:
            logits = model.forward_head(last)
            scores, classes = logits.float().softmax(1).topk(self.classes, dim=1)
        return found.float(), classes, scores
