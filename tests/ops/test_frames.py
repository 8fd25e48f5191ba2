"""Videos as images, in both layouts."""

from __future__ import annotations

import pytest
import torch

from ops.frames import frames_to_image


def test_tiles_keep_frames_whole() -> None:
    video = torch.randn(2, 3, 9, 4, 5)
    image = frames_to_image(video, "tiles")
    assert image.shape == (2, 3, 12, 15)
    for frame in range(9):
        i, j = divmod(frame, 3)
        tile = image[:, :, 4 * i : 4 * i + 4, 5 * j : 5 * j + 5]
        assert torch.equal(tile, video[:, :, frame])


def test_rows_put_scan_lines_side_by_side() -> None:
    """Four of them, as the published code's view of the memory has it; a frame is a band."""
    video = torch.randn(2, 3, 16, 8, 6)
    image = frames_to_image(video.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4))
    assert image.shape == (2, 3, 32, 24)
    for frame in (0, 7, 15):
        for line in range(8):
            row, place = divmod(8 * frame + line, 4)
            part = image[:, :, row, 6 * place : 6 * place + 6]
            assert torch.equal(part, video[:, :, frame, line])


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((1, 3, 15, 8, 8), "rows", "a square, such as 16, got 15"),
        ((1, 3, 0, 8, 8), "rows", "a square, such as 16, got 0"),
        ((1, 3, 8, 8), "rows", r"\(B, C, T, H, W\), got \(1, 3, 8, 8\)"),
        ((1, 3, 16, 8, 8), "grid", "'rows' or 'tiles', got 'grid'"),
    ],
)
def test_faults(shape: tuple[int, ...], layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frames_to_image(torch.zeros(shape), layout)
