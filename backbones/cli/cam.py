"""Where a classifier looks: Grad-CAM on the map of a late stage.

Ramprasaath R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones._base import StagedBackbone

__all__ = ["grad_cam"]

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
        Logits (B, num_classes), and heat (B, h, w) in 0 … 1: 0 where nothing speaks for the class.
    """
    with torch.no_grad():
        maps = [model.stem(images)]
        for stage in model.stages:
            maps.append(stage(maps[-1]))
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
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return logits.detach(), heat / peak.clamp(min=torch.finfo(heat.dtype).tiny)
