"""Details side by side."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from backbones.restoration.panels import Panel, draw_panels, most_detailed_window


def test_the_most_detailed_window():
    image = torch.zeros(3, 40, 90)
    image[:, 12:28:2, 60:76] = 1
    assert most_detailed_window(image, 18, 4) == (12, 60, 28, 76)
    assert most_detailed_window(image[:, :14, :30], 18, 4) == (0, 0, 12, 16)


def test_panels_show_the_same_detail(tmp_path):
    """A quarter of both pictures is coloured, of which one has half as many pixels."""
    large, small = torch.zeros(3, 16, 24), torch.zeros(3, 8, 12)
    large[0, 8:, 12:] = small[1, 4:, 6:] = 1
    draw_panels(tmp_path / "a.png", [Panel("a", large), Panel("b", small)], (8, 12, 16, 24), "t")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image)
    for colour in ((255, 0, 0), (0, 255, 0)):
        rows, columns = np.nonzero((pixels == colour).all(2))
        # Twelve pixels become as many as make 320, and eight in proportion.
        assert np.ptp(columns) + 1 == 27 * 12 and np.ptp(rows) + 1 == 27 * 8
