"""Thumbnails of a table's images, and contact sheets: rows of them with headings and names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from backbones.common.errors import DataError
from backbones.common.figures import INK, drawable, new_figure, save_figure
from backbones.common.images import DECODE_ERRORS, as_8_bits, open_image
from backbones.common.messages import one_line
from backbones.embedding.sources import ForeignError, OutsideError, Reader, reader_of

_COLUMNS = 8  # most images of a line
# In pixels.
_THUMBNAIL = 200
_SIDE, _GAP, _MARGIN = 150, 14, 16
_TITLE, _CAPTION, _BELOW = 44, 30, 44
_MUTED, _FRAME, _EMPTY = "#56606e", "#1f5fbf", "#eef1f5"


class Thumbnails:
    """Makes thumbnails of a table's images by their keys, see :func:`.sources.reader_of`."""

    def __init__(self, folder: str | Path, source: Sequence[str | Path] = ()) -> None:
        self.refused = ""  # why images were not even looked for; the first one's reason
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
    """Shrink an image to a longer side of at most 200 pixels, in RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damage that affects no pixel
        if isinstance(source, Image.Image):
            image = as_8_bits(source)
        elif isinstance(source, Path):
            image = open_image(source)
        else:
            with source:
                image = open_image(source)
    if max(image.size) > _THUMBNAIL:
        image = image.copy()
        image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return image


@dataclass
class Tile:
    """One image of a sheet."""

    image: Image.Image | None  # None if it can no longer be read
    heading: str  # bold text below it, such as its score
    key: str
    framed: bool = False  # highlighted, as the query is
    group: str = ""  # what a page can filter it by, such as "3 → 8"


@dataclass
class Row:
    """Images that belong together, under a caption."""

    caption: str
    tiles: list[Tile] = field(default_factory=list)


def draw_sheet(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw rows of at least one image each with their captions, headings and names, as a PNG."""
    step = _SIDE + _GAP
    lines = _lines(rows)
    ends = [column + min(len(row.tiles), _COLUMNS) for *_, (row, column) in lines]
    columns = max(4, *ends)
    heights = [
        _CAPTION + -(-len(row.tiles) // columns) * (_SIDE + _BELOW) for (row, _), *_ in lines
    ]
    width = 2 * _MARGIN + columns * step - _GAP
    height = _TITLE + sum(heights) + _MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    figure = new_figure(1, 1)
    figure.set_size_inches(width / figure.dpi, height / figure.dpi)

    def write(x: float, y: float, text: str, size: float, color: str, bold: bool = False) -> None:
        weight = "bold" if bold else "normal"
        at = x / width, 1 - y / height
        figure.text(*at, drawable(text), fontsize=size, color=color, weight=weight, va="top")

    write(_MARGIN, 12, title, 13, INK, bold=True)
    top = _TITLE
    for line, taken in zip(lines, heights, strict=True):
        for row, column in line:
            left = _MARGIN + column * step
            room = 21 * min(len(row.tiles), columns)
            write(left, top + 8, short_key(row.caption, room), 9.5, _MUTED)
            for number, tile in enumerate(row.tiles):
                x = left + number % columns * step
                y = top + _CAPTION + number // columns * (_SIDE + _BELOW)
                _paste(canvas, tile, x, y)
                write(x, y + _SIDE + 5, tile.heading, 9, _FRAME if tile.framed else INK, bold=True)
                write(x, y + _SIDE + 22, short_key(tile.key, 22), 7.5, _MUTED)
                if tile.image is None:
                    write(x + 8, y + 8, "cannot be read", 8, _MUTED)
        top += taken
    figure.figimage(np.asarray(canvas))
    save_figure(figure, path)


def _lines(rows: Sequence[Row]) -> list[list[tuple[Row, int]]]:
    """Rows with their first columns, short ones side by side; longer rows get their own lines."""
    lines: list[list[tuple[Row, int]]] = []
    free = -1
    for row in rows:
        count = len(row.tiles)
        if count > free:
            lines.append([])
            free = _COLUMNS
        lines[-1].append((row, _COLUMNS - free))
        free -= count + 1
    return lines


def short_key(key: str, longest: int) -> str:
    """The end of a key, the part that distinguishes the images of a folder."""
    key = one_line(key, 10**9)
    return key if len(key) <= longest else f"…{key[1 - longest :]}"


def _paste(canvas: Image.Image, tile: Tile, x: int, y: int) -> None:
    """Draw the whole image, centred in its square."""
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((x, y, x + _SIDE - 1, y + _SIDE - 1), fill=_EMPTY)
    if tile.image is not None:
        # Small images are enlarged without smoothing.
        is_large = max(tile.image.size) > _SIDE
        way = Image.Resampling.LANCZOS if is_large else Image.Resampling.NEAREST
        canvas.paste(ImageOps.pad(tile.image, (_SIDE, _SIDE), way, _EMPTY), (x, y))
    if tile.framed:
        draw.rectangle((x, y, x + _SIDE - 1, y + _SIDE - 1), outline=_FRAME, width=4)
