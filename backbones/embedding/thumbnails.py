"""Thumbnails of a table's images, for contact sheets and pages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

from PIL import Image

from backbones.core.images import DECODE_ERRORS, as_8_bits, open_image
from backbones.embedding.sources import reader
from backbones.embedding.table import metadata

__all__ = ["SIDE", "small", "thumbnails"]

SIDE = 200
"""The longer side of a thumbnail in pixels; smaller images keep their size."""


def thumbnails(folder: str | Path) -> Callable[[str], Image.Image | None]:
    """Make a function from keys to thumbnails, or None if an image is missing or unreadable.

    Args:
        folder: of the table.

    Raises:
        FileNotFoundError, TableError: see :func:`backbones.embedding.table.metadata`.
    """
    source = reader(metadata(folder)["source"])

    def find(key: str) -> Image.Image | None:
        try:
            return small(source.find(key))
        except DECODE_ERRORS:  # these include a reader's error for a missing key
            return None

    return find


def small(source: Path | IO[bytes] | Image.Image) -> Image.Image:
    """Shrink an image to a longer side of at most :data:`SIDE`, in RGB.

    Raises:
        one of :data:`backbones.core.images.DECODE_ERRORS`: it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damage that affects no pixel
        if isinstance(source, Image.Image):
            image = as_8_bits(source)
        elif isinstance(source, Path):
            image = open_image(source)
        else:
            with source:
                image = open_image(source)
    if max(image.size) > SIDE:
        image = image.copy()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image
