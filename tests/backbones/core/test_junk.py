"""Invalid values for any argument of `backbones` raise errors that name it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from junk import NEVER, complaints
from torch import nn
from zoo import FAMILIES, outlines, small

import backbones
from backbones.restoration.upscale import Upscaler, upscale

VAN = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}


def _van() -> Any:
    return backbones.create_model("van_b0", **VAN)


def _load(source: Any, strict: Any) -> Any:
    return backbones.load_checkpoint(_van(), source, strict)


def _fuse(dtype: Any, channels_last: Any) -> Any:
    return backbones.fuse(_van(), dtype, channels_last)


class _Restorer(nn.Conv2d):
    upscale, window_size, in_chans = 1, 8, 3

    def __init__(self) -> None:
        super().__init__(3, 3, 1)


def _create(**arguments: Any) -> Any:
    with outlines():
        return backbones.create_model(**VAN, **arguments)


def _upscale(picture: Any, **options: Any) -> Any:
    return upscale(_Restorer(), picture, **options)


_CFG = {"pretrained_cfg": None, "pretrained_cfg_overlay": None}
# By name: the function, and arguments that it takes.
GOOD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "create_model": (
        _create,
        {"name": "van_b0", "features_only": True, "checkpoint_path": None, **_CFG},
    ),
    "empty_cache": (backbones.empty_cache, {}),
    "explain": (
        backbones.explain,
        {"model": _van().eval(), "input_size": 32, "batch_size": 1, "repeats": 1},
    ),
    "fuse": (backbones.fuse, {"model": _van()}),
    "fuse, how": (_fuse, {"dtype": torch.float32, "channels_last": True}),
    "list_families": (backbones.list_families, {}),
    "list_models": (
        backbones.list_models,
        {"filter": "van*", "pretrained": True, "family": "van"},
    ),
    "load_checkpoint": (
        backbones.load_checkpoint,
        {"model": _van(), "source": _van().state_dict()},
    ),
    "load_checkpoint, how": (_load, {"source": _van().state_dict(), "strict": True}),
    "upscale": (
        _upscale,
        {
            **{"picture": np.zeros((8, 8, 3), np.uint8), "tile": 8, "overlap": 8},
            **{"tta": False, "amp": False, "max_memory": 1 << 34},
        },
    ),
    "Upscaler": (Upscaler, {"model": _Restorer()}),
}


def test_every_function_is_here() -> None:
    functions = {
        name
        for name in backbones.__all__
        if callable(value := getattr(backbones, name)) and not isinstance(value, type)
    }
    assert {name.partition(",")[0] for name in GOOD} >= functions


@pytest.mark.parametrize("name", GOOD)
def test_a_function(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = complaints(*GOOD[name])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("family", [*FAMILIES, "fused"])
def test_not_an_image(family: str) -> None:
    if family == "fused":
        model = _van().fuse()
    else:
        with outlines():
            model = small(family).eval()
    for call in (model, model.forward_features, model.forward_intermediates):
        for value in (None, 3, "x", [], *NEVER):
            with pytest.raises(TypeError):
                call(value)
