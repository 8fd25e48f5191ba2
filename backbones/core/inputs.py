"""The images that a model of this library or of timm accepts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from backbones.common.messages import first_line
from backbones.core.base import StagedBackbone


def channels_of(model: Any) -> int:
    """The number of channels of its images."""
    own = getattr(model, "in_chans", None)
    return int(model.pretrained_cfg["input_size"][0] if own is None else own)


def size_of(model: Any) -> tuple[int, int]:
    """Height and width of the images that it was made for."""
    height, width = (
        getattr(getattr(model, "patch_embed", None), "img_size", None)
        or (model.pretrained_cfg["input_size"][1:])
    )
    return int(height), int(width)


def preprocessing_of(model: Any, **settings: Any) -> dict[str, Any]:
    """``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.

    ``settings`` replace the model's own where they are not None.
    """
    channels = channels_of(model)
    settings.setdefault("input_size", (channels, *size_of(model)))
    config: dict[str, Any] = resolve_data_config(settings, model=model)
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def require_size(model: nn.Module, *sizes: Sequence[int]) -> None:
    """Raise a ValueError if a model of timm does not accept images (H, W) of these sizes.

    A copy runs on the meta device. Models of this library take all sizes.
    """
    if isinstance(model, StagedBackbone):
        return
    shadow = copy.deepcopy(model).to("meta").eval()
    dtype = next(shadow.parameters()).dtype
    for height, width in sizes:
        shape = (1, channels_of(model), height, width)
        try:
            with torch.inference_mode():
                shadow(torch.empty(shape, dtype=dtype, device="meta"))
        except NotImplementedError:
            return  # the meta device lacks an operator of the model
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{type(model).__name__} does not accept images of {height}×{width}: "
                f"{first_line(error)}"
            ) from error
