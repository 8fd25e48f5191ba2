"""Thumbnails of a table's images, for contact sheets and pages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from PIL import Image

from backbones.common.errors import DataError
from backbones.common.images import DECODE_ERRORS, as_8_bits, open_image
from backbones.embedding.sources import ForeignError, OutsideError, Reader, reader_of

SIDE = 200
"""The longer side of a thumbnail in pixels; smaller images keep their size."""


class Thumbnails:
    """Makes thumbnails of a table's images by their keys.

    Args:
        source: see :func:`backbones.embedding.sources.reader_of`.

    Attributes:
        refused: why images were not even looked for, a sentence for the first one; "" if all were.
    """

    def __init__(self, folder: str | Path, source: Sequence[str | Path] = ()) -> None:
        self.refused = ""
        self._reader: Reader | None = None
        try:
            self._reader = reader_of(folder, source)
        except ForeignError as error:
            self.refused = str(error)

    def __call__(self, key: str) -> Image.Image | None:
        """The thumbnail of an image; None if it is missing or unreadable, or may not be read."""
        if self._reader is None:
            return None
        try:
            return small(self._reader.find(key))
        except (OutsideError, DataError) as error:
            self.refused = self.refused or str(error)
        except DECODE_ERRORS:  # these include a reader's error for a missing key
            pass
        return None


def small(source: Path | IO[bytes] | Image.Image) -> Image.Image:
    """Shrink an image to a longer side of at most :data:`SIDE`, in RGB."""
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
