"""Where a classifier looks: Grad-CAM on the map of a late stage.

Ramprasaath R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backbones.cli.receptive_field import ReceptiveField, follow
from backbones.core.base import StagedBackbone

__all__ = ["grad_cam", "spread"]

# A coarser map than this shows nothing of where.
_LEAST_SIDE = 4


def grad_cam(
    model: StagedBackbone, images: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Heat of every image for one class: the map's channels, weighted by the logit's gradient.

    It works for every family, since all stages give maps (B, C, h, w), tokens or not. Of the maps
    that are 4 × 4 or larger it takes the last, which on the usual sizes is that of the last stage.

    Args:
        images: (B, C, H, W).
        classes: (B,); default the likeliest of each image.

    Returns:
        Logits (B, num_classes), and heat (B, H, W) in 0 … 1: 0 where nothing speaks for the class.
    """
    field = ReceptiveField()
    with torch.no_grad(), follow(model, field):
        maps = [model.stem(images)]
        grids = [(field.start, field.stride)]
        for stage in model.stages:
            maps.append(stage(maps[-1]))
            grids.append((field.start, field.stride))
    sides = [min(features.shape[2:]) for features in maps]
    # The stem's map is no candidate: stage i made maps[i + 1].
    taken = max((i for i in range(1, len(maps)) if sides[i] >= _LEAST_SIDE), default=1)
    with torch.enable_grad():
        features = maps[taken].detach().requires_grad_()
        last = features
        for stage in list(model.stages)[taken:]:
            last = stage(last)
        logits = model.forward_head(model.norm(last))
        chosen = logits.argmax(1) if classes is None else classes
        score = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    heat = (weights * features.detach()).sum(1).relu()  # (B, h, w)
    heat = spread(heat, images.shape[2:], *grids[taken])  # (B, H, W)
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return logits.detach(), heat / peak.clamp(min=torch.finfo(heat.dtype).tiny)


def spread(heat: Tensor, size: Sequence[int], start: float, stride: int) -> Tensor:
    """The heat of every pixel from that of the cells of a map: (B, h, w) → (B, H, W).

    Linear between the middles of the cells, which lie ``start + i * stride`` pixels from the edge
    (see :class:`ReceptiveField`), and even beyond the outermost.
    """
    for axis, side in zip((1, 2), size, strict=True):
        cells = torch.arange(heat.shape[axis], device=heat.device)
        pixels = torch.arange(side, device=heat.device) + 0.5
        places = ((pixels - start) / stride).clamp(0, len(cells) - 1)
        shares = (1 - (places[:, None] - cells).abs()).clamp(min=0).to(heat)  # (side, cells)
        heat = torch.einsum("pc,bcw->bpw" if axis == 1 else "pc,bhc->bhp", shares, heat)
    return heat
