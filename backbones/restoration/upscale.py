"""Restoration of pictures: in tiles that fit into memory, with any alpha, palette and bit depth.

Tiles and seams: :mod:`ops.tiling`. Self-ensemble over the 8 symmetries of the square: Radu Timofte
et al., "Seven ways to improve example-based single image super resolution",
https://arxiv.org/abs/1511.02228.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from backbones.common.errors import DataError
from backbones.common.memory import available_memory, measure_memory, used_memory
from backbones.common.messages import shown
from backbones.restoration.pictures import Picture, PictureError, arrays_of, read_picture
from backbones.restoration.resize import resize_bicubic
from ops.fuse.replayed import Replayed
from ops.tiling import tile_spans, tiled_strips

__all__ = ["Upscaler", "upscale"]

_DEFAULT_SHARE = 0.5
"""Fraction of the free memory to use without ``max_memory``."""


class Upscaler:
    """Restores pictures with a model, within a memory limit.

    Args:
        model: maps (B, C, H, W) in 0 … 1 to (B, C, H·upscale, W·upscale), with attributes
            ``upscale`` and ``in_chans`` (1 or 3) like HAT; it is put into eval mode. A model with
            a single channel processes the channels of colour pictures separately.
        tile: side of the tiles in pixels of the input, a multiple of the model's window; "auto"
            for the largest that fit; None for no tiling.
        overlap: margin around tiles, half of which is blended.
        tta: average over flips and rotations by 90°; 8 times slower.
        amp: autocast to bfloat16.
        max_memory: memory limit of this process in bytes (on a GPU: of its memory); None for half
            of the free memory. It only affects "auto" tiles.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tile: int | str | None = "auto",
        overlap: int = 32,
        tta: bool = False,
        amp: bool = False,
        max_memory: int | None = None,
    ) -> None:
        self.scale, self.channels = (getattr(model, n, 0) for n in ("upscale", "in_chans"))
        if not self.scale or self.channels not in (1, 3):
            raise ValueError(f"{type(model).__name__} does not output images of 1 or 3 channels")
        if isinstance(tile, str) and tile != "auto":
            raise ValueError(f"tile must be a number of pixels, 'auto' or None, got {tile!r}")
        self.window = int(getattr(model, "window_size", 16))
        for name, value in (("tile", tile), ("overlap", overlap)):
            if isinstance(value, int) and (value < 0 or value % self.window):
                raise ValueError(
                    f"{name} must be a multiple of the model's window of {self.window}, got {value}"
                )
        if tile == 0:
            raise ValueError("tile must be positive, 'auto', or None for no tiling")
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.tile, self.overlap = tile, overlap
        self.tta, self.amp, self.max_memory = tta, amp, max_memory

    def __call__(
        self,
        picture: Picture | Image.Image | np.ndarray,
        on_tile: Callable[[], object] | None = None,
    ) -> Any:
        """Restore a picture.

        Args:
            picture: a :class:`Picture`, an 8-bit Pillow image, or an array (H, W), (H, W, 1) or
                (H, W, 3) of uint8 or uint16; the result has the same type.
            on_tile: called after each tile.

        A :class:`DataError` says that ``max_memory`` is too low, or that the model's output is not
        finite.
        """
        if isinstance(picture, Picture):
            return self._restore(picture, on_tile)
        if isinstance(picture, Image.Image):
            if picture.mode.startswith(("I", "F")):
                raise PictureError(
                    f"Pillow images of mode {picture.mode} lose bits: pass the path or an array"
                )
            return self._restore(Picture(*arrays_of(picture)), on_tile).show()
        if not isinstance(picture, np.ndarray):
            raise TypeError(
                f"picture must be a Pillow image or a NumPy array, got {shown(picture)}"
            )
        array = picture[:, :, None] if picture.ndim == 2 else picture
        kind = array.dtype.name
        if array.ndim != 3 or array.shape[2] not in (1, 3) or kind not in ("uint8", "uint16"):
            raise ValueError(
                "arrays must be (H, W), (H, W, 1) or (H, W, 3) of uint8 or uint16, got "
                f"{picture.shape} of {picture.dtype}"
            )
        out = self._restore(Picture(array), on_tile).pixels
        return out[:, :, 0] if picture.ndim == 2 else out

    def tiles(self, height: int, width: int) -> int:
        """The number of tiles for a picture of this size."""
        side = self.tile_side(height, width)
        return math.prod(len(tile_spans(n, side, self.overlap)) for n in (height, width))

    def tile_side(self, height: int, width: int, depth: int = 1) -> int:
        """Side of the tiles of a picture with values of ``depth`` bytes; its own without tiling."""
        whole = max(height, width)
        if self.tile != "auto":
            return whole if self.tile is None else int(self.tile)
        if not min(height, width):
            return whole  # refused by tiled_strips
        if self.max_memory is None and whole <= self._probe_side():
            return whole  # no more than measuring would take
        budget = self._measured[2] - self._picture_bytes(height, width, depth)
        for most in range(self._padded(whole), 0, -self.window):
            side = self._even_side(most, height, width)
            missing = self._tile_bytes(side, height, width) - budget
            if missing <= 0:
                return min(side, whole)
        limit = "the free memory" if self.max_memory is None else "max_memory"
        raise DataError(
            f"{limit} is not enough for {height}×{width} pixels in tiles of {self.window} "
            f"with an overlap of {self.overlap}: {missing / 2**20:.0f} MiB are missing"
        )

    # --- memory

    def _padded(self, side: int) -> int:
        return -(-side // self.window) * self.window

    def _probe_side(self) -> int:
        """Size of the tile to measure: at least two windows (inner and shifted ones), and large
        compared with the position tables."""
        return max(32, 3 * self.window)

    def _even_side(self, most: int, height: int, width: int) -> int:
        """The smallest side that gives as many tiles as ``most``: of fewer shapes, and smaller."""
        return max(self._padded(-(-n // -(-n // most))) for n in (height, width))

    @functools.cached_property
    def _measured(self) -> tuple[float, float, float]:
        """Bytes per pixel of a tile and per shape of tiles, and the memory limit."""
        side = self._probe_side()
        probe = torch.zeros(1, self.channels, side, side, device=self.device, dtype=self.dtype)
        per_pixel, per_shape = measure_memory(self._network, probe)
        replayed = isinstance(self.model, Replayed) and self.device.type == "cpu"
        free = _DEFAULT_SHARE * available_memory(self.device)
        if self.max_memory is not None:
            free = self.max_memory - used_memory(self.device)
        return per_pixel, per_shape if replayed else 0, free

    def _tile_bytes(self, side: int, height: int, width: int) -> float:
        """Bytes for the largest tile with its margin, all shapes of tiles, and a row of tiles."""
        per_pixel, per_shape, _ = self._measured
        tall, wide = (
            {tile.last - tile.first for tile in tile_spans(n, side, self.overlap)}
            for n in (height, width)
        )
        shapes = {(rows, columns) for rows in tall for columns in wide}
        if self.tta:
            shapes |= {(columns, rows) for rows, columns in shapes}
        rows, columns = (self._padded(max(extents)) for extents in (tall, wide))
        # A strip of the result, the part shared with the next one, and two copies for rounding.
        strip = 4 * 12 * rows * width * self.scale**2
        return per_pixel * rows * columns + per_shape * len(shapes) + strip

    def _picture_bytes(self, height: int, width: int, depth: int) -> float:
        """Bytes of the picture, its result, and the files written from it."""
        if self.device.type != "cpu":
            return 0.0  # strips leave the GPU as they are finished
        before, after = height * width, height * width * self.scale**2
        # Input as read and as float; the result, Pillow's 4 bytes per pixel or a copy, and the
        # file.
        return before * (4 * depth + 12) + after * (3 * depth + 4 * depth + 3 * depth)

    # --- the picture

    @torch.inference_mode()
    def _restore(self, picture: Picture, on_tile: Callable[[], object] | None) -> Picture:
        limit = np.iinfo(picture.pixels.dtype).max
        height, width, colours = picture.pixels.shape
        x = torch.from_numpy(picture.pixels.astype(np.float32)).permute(2, 0, 1) / float(limit)
        # (1, 3, H, W); colour models get greyscale as RGB, greyscale models the channels as a
        # batch.
        x = x.unsqueeze(1) if self.channels == 1 else x.expand(3, -1, -1).unsqueeze(0)
        out = np.empty((height * self.scale, width * self.scale, colours), picture.pixels.dtype)
        side, row = self.tile_side(height, width, picture.bits // 8), 0
        overlap = self.overlap if side < max(height, width) else 0

        def network(tile: Tensor) -> Tensor:
            out = self._network(tile)
            if on_tile is not None:
                on_tile()
            return out

        blend = {"blend": min(overlap, side) // 2, "scale": self.scale}
        for strip in tiled_strips(network, x, tile_size=side, overlap=overlap, **blend):
            values = strip.squeeze(0 if self.channels == 3 else 1)  # (3 or colours, rows, W)
            if not values.isfinite().all():
                raise DataError("the model's output for it is not finite")
            if len(values) > colours:
                values = values.mean(0, keepdim=True)
            whole = (values.clamp(0, 1) * limit).round().permute(1, 2, 0).cpu().numpy()
            out[row : row + len(whole)] = whole
            row += len(whole)
        return replace(picture, pixels=out, alpha=self._enlarge_alpha(picture.alpha))

    def _network(self, x: Tensor) -> Tensor:
        """Run the model on a float32 tile; with ``tta``, averaged over the symmetries."""
        x = x.to(self.device, self.dtype)
        if not self.tta:
            return self._model(x)
        total = torch.zeros((), device=self.device)
        for turns, mirrored in itertools.product(range(4), ((), (3,))):
            out = self._model(x.rot90(turns, (2, 3)).flip(mirrored))
            total = total + out.flip(mirrored).rot90(-turns, (2, 3))
        return total / 8

    def _model(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(x).float()

    def _enlarge_alpha(self, alpha: np.ndarray | None) -> np.ndarray | None:
        """Alpha is resized bicubically."""
        if alpha is None or self.scale == 1:
            return alpha
        limit = np.iinfo(alpha.dtype).max
        large = resize_bicubic(torch.from_numpy(alpha.astype(np.float32)), self.scale)
        return large.round().clamp(0, float(limit)).numpy().astype(alpha.dtype)


def upscale(
    model: nn.Module, picture: str | Path | Image.Image | np.ndarray, **options: Any
) -> Any:
    """Restore one picture (a :class:`PictureError` if it cannot be read).

    ::

        model = backbones.create_model("hat_x4", checkpoint_path="HAT_SRx4.pth")
        upscale(model, "photo.jpg").save("photo_x4.png")

    Args:
        picture: a path, or as for a call of :class:`Upscaler`, whose ``options`` these are.

    Returns an array for an array, otherwise a Pillow image of 8 bits.
    """
    upscaler = Upscaler(model, **options)
    if isinstance(picture, (str, Path)):
        return upscaler(read_picture(Path(picture))).show()
    return upscaler(picture)
