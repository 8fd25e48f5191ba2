"""Videos as images: several frames are arranged in one large image.

Of "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud,
Time-Series and Image Recognition", https://arxiv.org/abs/2311.15599, for action recognition.
"""

from __future__ import annotations

import math

from torch import Tensor

from ops.arguments import checked

__all__ = ["frames_to_image"]


@checked()
def frames_to_image(video: Tensor, layout: str = "rows") -> Tensor:
    """Arrange n² frames in one image, n times as high and n times as wide.

    (B, C, n², H, W) → (B, C, n·H, n·W).

    Args:
        video: the frames, in order.
        layout: ``"rows"``, as in the published code, reinterprets the memory of all frames as one
            image. n scan lines of a frame are side by side, so that each frame is a band of H / n
            rows; frames share rows if H is not a multiple of n.
            ``"tiles"`` keeps the frames intact, in n rows of n frames.

    Raises:
        ValueError: another layout, or a number of frames that is not a square.
    """
    if video.ndim != 5:
        raise ValueError(f"video must be (B, C, T, H, W), got {tuple(video.shape)}")
    batch, channels, frames, height, width = video.shape
    side = math.isqrt(frames)
    if side**2 != frames or not frames:
        raise ValueError(f"the number of frames must be a square, such as 16, got {frames}")
    if layout == "tiles":
        video = video.unflatten(2, (side, side)).transpose(3, 4)  # (B, C, n, H, n, W)
    elif layout != "rows":
        raise ValueError(f"layout must be 'rows' or 'tiles', got {layout!r}")
    return video.reshape(batch, channels, side * height, side * width)
