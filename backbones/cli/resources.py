"""Early checks for problems that would otherwise surface after minutes: memory and disk space."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backbones.cli.common import CommandError
from backbones.restoration.memory import available_memory, live_bytes

__all__ = ["require_disk_space", "require_memory"]


@torch.inference_mode()
def require_memory(model: Any, shapes: Sequence[Sequence[int]]) -> None:
    """Check on the meta device that memory suffices for images of these shapes.

    Raises:
        CommandError: the live tensors are larger than the free memory.
    """
    dtype = next(model.parameters()).dtype
    shadow = copy.deepcopy(model).to("meta").eval()
    free = available_memory(torch.device("cpu"))
    for shape in shapes:
        needed = math.prod(shape) * dtype.itemsize
        if needed <= free:  # the meta device does not count to infinity
            needed += live_bytes(shadow, torch.empty(*shape, dtype=dtype, device="meta"))
        if needed > free:
            raise CommandError(
                f"images of {'×'.join(map(str, shape))} need more than {needed / 1e9:.3g} GB of "
                f"memory, but only {free / 1e9:.3g} GB are free; reduce --size or --batch"
            )


def require_disk_space(folder: Path, size: int) -> None:
    """Check that a disk has ``size`` bytes left.

    Raises:
        CommandError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CommandError(
            f"no space left on the disk: {folder} needs {size / 1e6:.0f} MB, only "
            f"{free / 1e6:.0f} MB are free"
        )
