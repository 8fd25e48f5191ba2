"""Arguments of the package and of every family: refused by their names, or a model that works."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from junk import NEVER, complaints
from torch import nn
from zoo import CLASSIFIERS, FAMILIES, SMALL, outlines, small

import backbones
from backbones.core.keywords import POOLINGS
from backbones.restoration.upscale import Upscaler, upscale

# No keyword of any family can be one of these.
IMPOSSIBLE: list[Any] = [
    *("3", b"3", 1j, object(), int, {}, {1: 2}, {1, 2}, iter((1, 2))),
    *(float("nan"), float("inf"), -float("inf"), 10**30, -(10**30)),
]
# These can be right for some.
PERHAPS: list[Any] = [
    *(None, "", "avg", 2.5, -1, 0, 1, 2, 3, 5, 7, 16, 1e-9, True, False, [], (1, 2), [3]),
    *(range(3), np.int64(2), np.float32(0.5), torch.tensor(2), torch.zeros(2)),
]


@functools.cache
def _class(family: str) -> Any:
    with outlines():
        return type(small(family))


def _keywords(family: str) -> dict[str, Any]:
    """The arguments of the family's class, as they are in its small model."""
    parameters = inspect.signature(_class(family)).parameters
    return {**{p.name: p.default for p in parameters.values()}, **SMALL[family][1]}


def _variants(value: Any, nasty: list[Any]) -> Iterator[Any]:
    yield from nasty
    if isinstance(value, tuple):
        for place in (0, len(value) - 1):
            for other in nasty:
                yield (*value[:place], other, *value[place + 1 :])


def _refused(family: str, keyword: str, value: Any) -> str:
    with outlines(), pytest.raises((TypeError, ValueError)) as raised:
        _class(family)(**{**SMALL[family][1], keyword: value})
    return str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_nothing_can_be(family: str) -> None:
    model_class, arguments = _class(family), SMALL[family][1]
    for keyword, default in _keywords(family).items():
        for value in _variants(default, IMPOSSIBLE):
            with outlines(), pytest.raises((TypeError, ValueError)) as raised:
                model_class(**{**arguments, keyword: value})
            message = str(raised.value)
            assert message.startswith(keyword) and "\n" not in message, (value, message)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_too_few_or_too_many(family: str) -> None:
    for keyword, value in _keywords(family).items():
        if isinstance(value, tuple) and (family, keyword) != ("efficientvit", "kernel_sizes"):
            for other in ((), value[:-1], (*value, value[-1])):
                message = _refused(family, keyword, other)
                assert keyword in message or "depths" in message, message


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", FAMILIES)
def test_refused_or_a_model_that_works(family: str) -> None:
    """Every keyword with everything that some keyword takes."""
    model_class, arguments = _class(family), SMALL[family][1]
    keywords = _keywords(family)
    for keyword, default in keywords.items():
        for value in _variants(default, PERHAPS):
            with outlines():
                try:
                    model = model_class(**{**arguments, keyword: value}).eval()
                except (TypeError, ValueError) as error:
                    # Its own name, or that of one that it does not go with; of a stage's, too.
                    assert any(name.removesuffix("s") in str(error) for name in keywords), error
                    continue
                output = model(torch.zeros(1, model.in_chans, 64, 64))
            if model.num_classes:
                assert output.shape[:2] == (1, model.num_classes), (keyword, value)


@torch.no_grad()
@pytest.mark.parametrize("poolings", [("",), pytest.param(POOLINGS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_poolings(family: str, poolings: tuple[str, ...]) -> None:
    model_class, arguments = _class(family), SMALL[family][1]
    with outlines():
        images = torch.zeros(1, 3, 64, 64)
        for pooling in poolings:
            for classes in (0, 5):
                arguments = {**arguments, "global_pool": pooling, "num_classes": classes}
                try:
                    model = model_class(**arguments).eval()
                except ValueError as error:
                    assert "global_pool" in str(error)
                    continue
                assert model(images).ndim == (2 if pooling else 4)
                if classes:
                    assert model(images).shape[1] == classes


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_refused_classifier_changes_nothing(family: str) -> None:
    with outlines():
        model = small(family, num_classes=3)
        before = model.get_classifier()
        for arguments in (("3",), (2.5,), (-1,), (None,), (5, "AVG"), (5, 3), (5, "nonsense")):
            with pytest.raises((TypeError, ValueError), match="num_classes|global_pool"):
                model.reset_classifier(*arguments)
        if not model.classifies_maps:
            with pytest.raises(ValueError, match="num_classes must be 0"):
                model.reset_classifier(5, "")
        assert model.get_classifier() is before and model.num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"in_chans": 0}, ValueError, "in_chans must be in 1 … 65536, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must be in 0 … 100000000, got -1"),
        ({"num_classes": True}, TypeError, "num_classes must be a whole number, got True"),
        ({"drop_path_rate": 2.0}, ValueError, "drop_path_rate must be in 0 … 1, got 2"),
        ({"global_pool": "median"}, ValueError, "global_pool must be one of .*, got 'median'"),
        ({"features_only": "no"}, TypeError, "features_only must be True or False, got 'no'"),
        ({"pretrained": "no"}, TypeError, "pretrained must be True or False, got 'no'"),
        ({"checkpoint_path": 3}, TypeError, "a path, a URL or a mapping.*, got int 3"),
        ({"pretrained_cfg": 3}, TypeError, "pretrained_cfg must be a tag, a dict or .*, got 3"),
        ({"pretrained_cfg_overlay": "x"}, TypeError, "overlay must be a dict, got 'x'"),
        ({"pretrained_cfg_overlay": {"input_size": 3}}, TypeError, "input_size of .*, got 3"),
        ({"features_only": True, "out_indices": (0, "1")}, TypeError, r"out_indices\[1\] .*'1'"),
        ({"features_only": True, "out_indices": (9,)}, ValueError, "has 4 feature maps"),
    ],
    ids=str,
)
def test_the_factory(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        small("van", **arguments)


def test_numbers_of_numpy_and_lists() -> None:
    with outlines():
        model = small("van", num_classes=np.int64(5), depths=[1, 1, 1, 1], dims=np.full(4, 16))
    assert type(model.num_classes) is int
    assert model(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 5)


# ---- of the package's functions ------------------------------------------------------------------
VAN = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}


def _van(name: str = "van_b0", **arguments: Any) -> Any:
    return backbones.create_model(name, **VAN, **arguments)


class _Restorer(nn.Conv2d):
    upscale, window_size, in_chans = 1, 8, 3

    def __init__(self) -> None:
        super().__init__(3, 3, 1)


# By name: the function, and arguments that it takes.
GOOD: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "create_model": (
        _van,
        {
            **{"name": "van_b0", "features_only": True, "checkpoint_path": None},
            **{"pretrained_cfg": None, "pretrained_cfg_overlay": None},
        },
    ),
    "explain": (
        backbones.explain,
        {"model": _van().eval(), "input_size": 32, "batch_size": 1, "repeats": 1},
    ),
    "fuse": (backbones.fuse, {"model": _van()}),
    "fuse, how": (
        lambda **how: backbones.fuse(_van(), **how),
        {"dtype": torch.float32, "channels_last": True},
    ),
    "list_models": (backbones.list_models, {"filter": "van*", "pretrained": True, "family": "van"}),
    "load_checkpoint": (
        backbones.load_checkpoint,
        {"model": _van(), "source": _van().state_dict()},
    ),
    "load_checkpoint, how": (
        lambda **how: backbones.load_checkpoint(_van(), **how),
        {"source": _van().state_dict(), "strict": True},
    ),
    "upscale": (
        lambda **options: upscale(_Restorer(), **options),
        {
            **{"picture": np.zeros((8, 8, 3), np.uint8), "tile": 8, "overlap": 8},
            **{"tta": False, "amp": False, "max_memory": 1 << 34},
        },
    ),
    "Upscaler": (Upscaler, {"model": _Restorer()}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_function(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with outlines() if name == "create_model" else nullcontext():
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
