"""Single-resolution networks: feature maps, position tables, pyramids."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_tokens import PlainTokens, register_plain_tokens
from torch import Tensor
from zoo import images

import backbones
from backbones.core import registry


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    entries = dict(registry._entries)
    register_plain_tokens()
    yield
    registry._entries.clear()
    registry._entries.update(entries)


def _model(**kwargs: Any) -> PlainTokens:
    torch.manual_seed(0)
    return backbones.create_model("plain_tokens", **kwargs).eval()


def _features(**kwargs: Any) -> Any:
    return _model(features_only=True, **kwargs)


def _block_maps(model: PlainTokens, x: Tensor) -> list[Tensor]:
    """The map behind every block, by calling one after the other."""
    maps = []
    x = model.stem(x).permute(0, 2, 3, 1)
    for stage in model.stages:
        for block in stage.blocks:
            x = block(x)
            maps.append(x.permute(0, 3, 1, 2))
    return maps


# -- features are those of blocks ------------------------------------------------------------------
@torch.no_grad()
def test_indices_count_blocks() -> None:
    model = _model(depths=(1, 2, 3, 1))
    x = images(1, 3, 64, 48)
    expected = _block_maps(model, x)
    last, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info) == 7
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(last, model.forward_features(x))
    assert {info["reduction"] for info in model.feature_info} == {16}
    assert [info["module"] for info in model.feature_info] == [*map(model.block_name, range(7))]
    for indices, wanted in (([1, 4], [1, 4]), (2, [5, 6]), ([-1, 0], [0, 6])):
        taken = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        torch.testing.assert_close(taken, [expected[i] for i in wanted])


@torch.no_grad()
def test_norm_and_early_stop() -> None:
    model = _model()
    x = images(1, 3, 64, 64)
    plain = model.forward_intermediates(x, [2, 11], intermediates_only=True)
    normed = model.forward_intermediates(x, [2, 11], norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, [model.norm(m) for m in plain])
    last, maps = model.forward_intermediates(x, [4], stop_early=True, output_fmt="NHWC")
    torch.testing.assert_close(last, maps[0].permute(0, 3, 1, 2))
    model.stages[1].blocks[2].forward = None  # block 5 is not called
    model.forward_intermediates(x, [4], stop_early=True)


@pytest.mark.parametrize("indices", [None, (3, 5, 7, 10), (0,), (-2, 6), 3])
@torch.no_grad()
def test_features_only_keeps_the_blocks_that_it_needs(indices: Any) -> None:
    x = images(1, 3, 64, 64)
    whole = _model()
    chosen = (2, 5, 8, 11) if indices is None else indices  # a map of each stage
    expected = whole.forward_intermediates(x, chosen, intermediates_only=True)
    features = _features(**({} if indices is None else {"out_indices": indices}))
    torch.testing.assert_close(features(x), expected)
    blocks = sum(len(stage.blocks) for stage in features.model.stages)
    assert blocks == max(features.out_indices) + 1
    assert features.feature_info.channels() == [16] * len(expected)
    assert features.feature_info.reduction() == [16] * len(expected)
    report = backbones.load_checkpoint(features, whole.state_dict())
    assert not report.unexpected and not report.missing


# -- tables of positions ---------------------------------------------------------------------------
@torch.no_grad()
def test_checkpoints_for_other_sizes_are_interpolated() -> None:
    small, large = _model(), _model(img_size=128)
    report = backbones.load_checkpoint(large, small.state_dict())
    assert report.resized == ["stem.1.pos_embed"]
    x = images(1, 3, 128, 128)
    torch.testing.assert_close(large(x), small(x))
    state = small.state_dict()
    state["stem.1.pos_embed"] = state["stem.1.pos_embed"][:, :15]
    with pytest.raises(backbones.CheckpointError, match="pos_embed has shape"):
        backbones.load_checkpoint(large, state)


def test_exports_with_any_size() -> None:
    model = _model()
    sides = {2: 16 * torch.export.Dim("h", min=2, max=20), 3: 16 * torch.export.Dim("w", max=20)}
    program = torch.export.export(
        model, (images(2, 3, 96, 128),), dynamic_shapes=(sides,), strict=False
    )
    for size in ((64, 64), (160, 48)):
        x = images(2, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


# -- pyramids --------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_pyramid_of_the_last_map() -> None:
    x = images(1, 3, 64, 96)
    model = _model(pyramid=True)
    last, maps = model.forward_intermediates(x)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [info["module"] for info in model.feature_info] == [f"pyramid.{i}" for i in range(4)]
    torch.testing.assert_close(maps[2], _block_maps(model, x)[-1])
    torch.testing.assert_close(last, model.norm(maps[2]))
    normed = model.forward_intermediates(x, [2], norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[0], last)
    with pytest.raises(ValueError, match="not the maps of stages"):
        model.stage_features()
    some = _features(pyramid=True, out_indices=(1, 3))
    backbones.load_checkpoint(some, model.state_dict())
    torch.testing.assert_close(some(x), [maps[1], maps[3]])
    assert not list(some.model.pyramid[0].parameters())


def test_classification_weights_leave_the_pyramid_as_it_is() -> None:
    model = _features(pyramid=True)
    made = copy.deepcopy(model.model.pyramid.state_dict())
    weights = _model().state_dict()
    report = backbones.load_checkpoint(model, weights)
    assert report.reinitialised == [f"pyramid.{name}" for name in made]
    for name, tensor in model.model.pyramid.state_dict().items():
        assert torch.equal(tensor, made[name])
    assert not backbones.load_checkpoint(model, model.model.state_dict()).reinitialised
