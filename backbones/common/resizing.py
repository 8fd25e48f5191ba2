"""timm's resizing and cropping for evaluation, computed faster and with the same pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from backbones.common.errors import memory_shortage
from backbones.common.images import DECODE_ERRORS, read_pixels
from backbones.common.messages import first_line
from ops.cpu.resize.resize import MOST_SCALE, look_up, resize_part, unavailable

_FILTERS = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Resizing:
    """timm's transform for evaluation: resizing and cropping to 8 bits, and normalisation.

    The kernel :func:`ops.cpu.resize.resize.resize_part` computes only the pixels that are cropped,
    where it is available and its pixels are those of the installed Pillow; otherwise the transform
    itself runs. ``config`` is the preprocessing, as resolved by timm; the images that it is for are
    read in ``mode``, Pillow's ``RGB`` or ``L``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"
        self._transform = create_transform(**config, is_training=False, use_prefetcher=True)
        self._side = max(config["input_size"][1:]) / config["crop_pct"]
        mean, std = (torch.tensor(config[key]).view(-1, 1) for key in ("mean", "std"))
        # In timm's order, so that the values are its own to the last bit.
        self._tables = torch.arange(256.0).div_(255).sub(mean).div_(std).numpy()
        self._is_fast = unavailable() is None
        self._plan = _plan_of(self._transform) if self._is_fast and _matches_pillow() else None

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Resize and crop an image of 8 bits: (H, W), or (H, W, C), to (C, height, width)."""
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        plan = None if self._plan is None else self._plan(height, width)
        if plan is not None:
            pixels = np.asarray(image)
            return resize_part(pixels[:, :, None] if pixels.ndim == 2 else pixels, *plan)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
        return np.asarray(self._transform(image))

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """Resize and crop an array; ValueError if it is so narrow that it would become huge."""
        height, width = pixels.shape[:2]
        shorter, longer = sorted((height, width))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and self._side * self._side * longer > 2 * limit * shorter:
            raise ValueError(f"an image of {width}×{height} pixels is too narrow to be resized")
        return self(pixels)

    def read(self, path: Path) -> tuple[np.ndarray | None, str]:
        """:meth:`fit` of a file, or None and the reason why it cannot be read."""
        try:
            return self.fit(read_pixels(path, self.mode)), ""
        except DECODE_ERRORS as error:
            return None, first_line(error)
        except (MemoryError, RuntimeError) as error:
            if (shortage := memory_shortage(error)) is None:
                raise
            return None, shortage

    def normalise(self, images: np.ndarray) -> Tensor:
        """A batch (B, C, H, W) for the network, bit-identical to timm's transform."""
        if self._is_fast:
            return torch.from_numpy(look_up(images, self._tables))
        tables = torch.from_numpy(self._tables)
        planes = [tables[c][torch.from_numpy(images[:, c]).long()] for c in range(len(tables))]
        return torch.stack(planes, 1)


_Plan = tuple[tuple[int, int], tuple[int, int, int, int], str]


def _plan_of(transform: Any) -> Callable[[int, int], _Plan | None] | None:
    """The arguments of ``resize_part`` by height and width, or None where the transform has to run.

    None if timm's transform does anything else than to resize and keep the centre.
    """
    steps = transform.transforms
    if [type(step) for step in steps[:-1]] != [Resize, CenterCrop]:
        return None
    resize, crop = steps[0], tuple(steps[1].size)
    if resize.interpolation not in _FILTERS or resize.max_size is not None:
        return None
    sizes = (resize.size,) if isinstance(resize.size, int) else tuple(resize.size)
    # Spawned workers of loaders get it pickled, which a closure cannot be.
    return functools.partial(_plan, sizes, crop, _FILTERS[resize.interpolation])


def _plan(
    sizes: tuple[int, ...], crop: tuple[int, int], filter: str, height: int, width: int
) -> _Plan | None:
    if len(sizes) == 2:
        new_height, new_width = sizes
    else:  # the shorter side
        scaled = int(sizes[0] * max(height, width) / min(height, width))
        new_height, new_width = (sizes[0], scaled) if height < width else (scaled, sizes[0])
    if new_height < crop[0] or new_width < crop[1]:
        return None  # it is padded
    if height > new_height and height - new_height > 2 * (width - new_width):
        return None  # newer versions of Pillow resize columns first
    if height > MOST_SCALE * new_height or width > MOST_SCALE * new_width:
        return None
    top = round((new_height - crop[0]) / 2)
    left = round((new_width - crop[1]) / 2)
    return (new_height, new_width), (top, left, *crop), filter


@functools.cache
def _matches_pillow() -> bool:
    """Whether the kernel gives the same pixels as the installed Pillow, tested on noise.

    In black and white, which shows the order of the passes.
    """
    noise = np.random.default_rng(0).integers(0, 2, (45, 60, 3), np.uint8) * 255
    for filter, resampling in _RESAMPLING.items():
        for pixels in (noise, noise[:, :, :1], noise[:30, :40]):
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            for height, width in ((31, 43), (70, 90)):
                wanted = np.asarray(image.resize((width, height), resampling))
                wanted = wanted.reshape(height, width, -1).transpose(2, 0, 1)
                box = (3, 5, height - 6, width - 7)
                found = resize_part(pixels, (height, width), box, filter)
                if not np.array_equal(found, wanted[:, 3:-3, 5:-2]):
                    return False
    return True
