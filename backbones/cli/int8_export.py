"""Export of a model in int8 as a safetensors file that the library itself loads."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import backbones
from backbones.cli import quantizing
from backbones.cli.graphs import TOLERANCE, difference, noise
from backbones.common.errors import CommandError
from backbones.common.files import replacing_together, save_weights
from backbones.common.keys import dump
from backbones.common.outputs import Kind
from backbones.core.inputs import channels_of
from backbones.core.loaded import Loaded, fuse
from backbones.fusing.precision import Precision

INT8 = Kind((".safetensors",), rb".{8}\{.*\.weight_scale\"")
"""The files of :func:`export_int8`."""

_BATCH = 16  # images to calibrate with at a time


def export_int8(
    loaded: Loaded,
    path: Path,
    size: tuple[int, int],
    images: Sequence[Tensor] | None = None,
    max_drop: float | None = None,
) -> None:
    """Write ``path`` if the model loaded from it computes the same, and print a report.

    Args:
        loaded: its model is fused in int8.
        size: of the image to compare the file with the model on.
        images: (1, C, H, W) each, to calibrate with; None for ranges of each row.
        max_drop: see ``fuse()``.
    """
    exact, model = copy.deepcopy(loaded.model), loaded.model
    batches = None if images is None else torch.cat(list(images)).split(_BATCH)
    fuse(model, dtype=torch.int8, calibrate=batches, max_drop=max_drop)
    precision: Precision = model.precision
    if not precision.quantized:
        reason = precision.reason or f"no layer would gain from int8 here; {precision.summary()}"
        raise CommandError(f"{loaded.name}: {reason}")
    probe = noise((1, channels_of(exact), *size), 0)
    with replacing_together(path) as scratch:
        save_weights(scratch, model.int8_state_dict(), _metadata(loaded))
        again = copy.deepcopy(exact)
        try:
            backbones.load_checkpoint(again, scratch)
        except backbones.CheckpointError as error:
            problem = str(error).replace(str(scratch), str(path))
            raise CommandError(f"{loaded.name}: {problem}; it was not written") from error
        wrong = difference(_run(again, probe), _run(model, probe))
        if wrong > TOLERANCE:
            raise CommandError(
                f"{loaded.name}: the file differs from the model by {wrong:.1e} of the maximum "
                "output; it was not written"
            )
    sys.stdout.write(f"  {precision.summary()}\n")
    if images is not None:
        found = quantizing.agreement(exact, lambda image: _run(model, image), images)
        sys.stdout.write(f"  {found.text(len(images))}\n")
    megabytes = path.stat().st_size / 1e6
    sys.stdout.write(f"{path}: {loaded.name} in int8 for any batch and size, {megabytes:.1f} MB\n")


@torch.inference_mode()
def _run(model: Any, image: Tensor) -> Tensor:
    out: Tensor = model(image.to(next(model.parameters()).dtype))
    return out.float()


def _metadata(loaded: Loaded) -> dict[str, str]:
    """What :func:`backbones.core.loaded.load` reads."""
    facts = {"model": loaded.name}
    if loaded.classes:
        facts["classes"] = json.dumps(loaded.classes)
    if loaded.recipe is not None:
        facts["recipe"] = dump(loaded.recipe)
    return facts
