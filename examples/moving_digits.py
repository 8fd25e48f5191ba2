"""Recognise the direction of moving digits: a video network on 16 frames tiled in one image.

    python examples/moving_digits.py

scikit-learn's digits move left, right, up or down on a torus of 16×16 pixels, so that a single
frame does not reveal the direction. ``--layout rows`` arranges the frames like the published video
code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import backbones
from ops.frames import frames_to_image

FRAMES, SIDE = 16, 16
WAYS = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])  # left, right, up, down


def videos(
    digits: Tensor, count: int, layout: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``count`` videos of digits (N, 8, 8) as images (count, 3, 64, 64), with their directions."""
    picked = digits[torch.randint(len(digits), (count,), generator=generator)]
    ways = torch.randint(len(WAYS), (count,), generator=generator)
    starts = torch.randint(SIDE, (count, 2), generator=generator)
    frames = torch.zeros(count, FRAMES, SIDE, SIDE)
    frames[:, :, :8, :8] = picked[:, None]
    for i in range(count):
        for t in range(FRAMES):
            place = (starts[i] + t * WAYS[ways[i]]).tolist()
            frames[i, t] = frames[i, t].roll(place, (0, 1))
    video = frames[:, None].expand(-1, 3, -1, -1, -1)
    return frames_to_image(video, layout), ways


def main(arguments: Sequence[str] | None = None) -> float:
    """Train and test; returns the accuracy on test videos."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=("rows", "tiles"), default="tiles")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    digits = torch.from_numpy(load_digits().images).float() / 16
    train, test = digits[:1400], digits[1400:]

    model = backbones.create_model(
        "unireplknet_a", dims=(24, 48, 96, 192), depths=(1, 1, 2, 1), num_classes=len(WAYS)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for step in range(args.steps):
        images, ways = videos(train, args.batch_size, args.layout, generator)
        loss = F.cross_entropy(model(images), ways)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step:4d}: loss {loss.item():.3f}")
    images, ways = videos(test, 256, args.layout, generator)
    with torch.inference_mode():
        right = (backbones.fuse(model)(images).argmax(1) == ways).float().mean().item()
    print(f"{100 * right:.1f} % of 256 new videos are classified correctly")
    return right


if __name__ == "__main__":
    main()
