"""Grad-CAM on the feature map of a late stage.

Ramprasaath R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", https://arxiv.org/abs/1610.02391.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backbones.cli.receptive_field import ReceptiveField, follow
from backbones.core.base import StagedBackbone
from backbones.core.stage import map_of, with_map

# Coarser maps don't localise anything.
_LEAST_SIDE = 4


def grad_cam(
    model: StagedBackbone, images: Tensor, classes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM heat maps: a feature map's channels, weighted by the gradient of one logit.

    Works for every family, since all stages return maps (B, C, h, w). It uses the last map of 4 × 4
    or larger, which is the last stage's at the usual input sizes.

    (B, C, H, W) and classes (B,), by default the most likely ones, → logits (B, num_classes), and
    heat (B, H, W) in 0 … 1, where 0 means no evidence.
    """
    field = ReceptiveField()
    with torch.no_grad(), follow(model, field):
        outputs = [model.stem(images)]
        grids = [(field.start, field.stride)]
        for stage in model.stages:
            outputs.append(stage(outputs[-1]))
            grids.append((field.start, field.stride))
    sides = [min(map_of(output).shape[2:]) for output in outputs]
    # The stem's map is not a candidate; outputs[i + 1] is that of stage i.
    taken = max((i for i in range(1, len(outputs)) if sides[i] >= _LEAST_SIDE), default=1)
    with torch.enable_grad():
        features = map_of(outputs[taken]).detach().requires_grad_()
        last = with_map(outputs[taken], features)
        for stage in list(model.stages)[taken:]:
            last = stage(last)
        logits = model.forward_head(model.norm(map_of(last)))
        chosen = logits.argmax(1) if classes is None else classes
        score = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    heat = (weights * features.detach()).sum(1).relu()  # (B, h, w)
    heat = upsample_heat(heat, images.shape[2:], *grids[taken])  # (B, H, W)
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return logits.detach(), heat / peak.clamp(min=torch.finfo(heat.dtype).tiny)


def upsample_heat(heat: Tensor, size: Sequence[int], start: float, stride: int) -> Tensor:
    """Interpolate heat from the cells of a map to pixels: (B, h, w) → (B, H, W).

    Linear between the centres of the cells, which are ``start + i * stride`` pixels from the edge
    (see :class:`ReceptiveField`), and constant beyond the outermost.
    """
    for axis, side in zip((1, 2), size, strict=True):
        cells = torch.arange(heat.shape[axis], device=heat.device)
        pixels = torch.arange(side, device=heat.device) + 0.5
        places = ((pixels - start) / stride).clamp(0, len(cells) - 1)
        shares = (1 - (places[:, None] - cells).abs()).clamp(min=0).to(heat)  # (side, cells)
        heat = torch.einsum("pc,bcw->bpw" if axis == 1 else "pc,bhc->bhp", shares, heat)
    return heat
