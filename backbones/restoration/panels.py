"""Comparison figures: the same detail of several pictures side by side, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from backbones.common.files import write_atomically
from backbones.restoration.pictures import to_pixels

_INK, _FAINT, _PAPER = "#222b38", "#5c6675", "#ffffff"
_MARGIN, _TITLE = 14, 40
_LEAST_WIDTH = 320  # of a panel; smaller details are enlarged by an integer factor

Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class Panel:
    """One of the pictures, (C, H, W) in 0 … 1, C 1 or 3, with two lines of caption."""

    name: str
    image: Tensor
    text: str = ""


def most_detailed_window(image: Tensor, side: int, step: int) -> Window:
    """Top, left, bottom, right of the square with the most contrast between neighbours.

    The image is (C, H, W); in smaller ones, the square is smaller than ``side``. It starts and ends
    at multiples of ``step``.
    """
    grey = image.mean(0, keepdim=True)
    down, across = (grey.diff(dim=d, prepend=grey.narrow(d, 0, 1)).abs() for d in (1, 2))
    # Averages over cells of step × step, then over windows of them.
    cells = F.avg_pool2d(down + across, step)
    tall, wide = (min(side // step, cells.shape[axis]) for axis in (1, 2))
    windows = F.avg_pool2d(cells, (tall, wide), 1)[0]
    row, column = divmod(int(windows.argmax()), windows.shape[1])
    top, left, bottom, right = (step * n for n in (row, column, row + tall, column + wide))
    return top, left, bottom, right


def draw_panels(path: Path, panels: Sequence[Panel], window: Window, title: str) -> None:
    """Write a PNG with the same detail of all panels in a row, atomically.

    Sizes of the images are integer fractions of the largest, in whose pixels ``window`` is; smaller
    ones are enlarged by nearest neighbour.
    """
    largest = max(panel.image.shape[2] for panel in panels)
    top, left, bottom, right = window
    zoom = max(1, -(-_LEAST_WIDTH // (right - left)))
    wide, tall = (right - left) * zoom, (bottom - top) * zoom
    big, small = ImageFont.load_default(19), ImageFont.load_default(15)
    head = _TITLE + 52
    size = (_MARGIN + (wide + _MARGIN) * len(panels), head + tall + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 10), title, fill=_INK, font=big)
    for number, panel in enumerate(panels):
        x = _MARGIN + number * (wide + _MARGIN)
        draw.text((x, _TITLE + 2), panel.name, fill=_INK, font=small)
        draw.text((x, _TITLE + 24), panel.text, fill=_FAINT, font=small)
        factor = round(largest / panel.image.shape[2])
        detail = panel.image[:, top // factor : bottom // factor, left // factor : right // factor]
        picture = Image.fromarray(to_pixels(detail.expand(3, -1, -1)))
        sheet.paste(picture.resize((wide, tall), Image.Resampling.NEAREST), (x, head))
    write_atomically(path, lambda file: sheet.save(file, format="PNG"))
