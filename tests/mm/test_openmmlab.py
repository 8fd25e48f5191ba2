"""The adapter: maps, frozen parts, weights, learning rates, messages."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import convert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from timm.layers import DropPath
from torch import nn
from training_runs import a_few
from zoo import CLASSIFIERS, SMALL, outlines

import backbones
from backbones.openmmlab import VisionBackbone, check_channels

ROOT = Path(__file__).parents[2]


def _build(**kwargs: Any) -> VisionBackbone:
    torch.manual_seed(0)
    arguments = {"name": "van_b0", "depths": (1, 1, 2, 1), **kwargs}
    return MODELS.build({"type": "VisionBackbone", **arguments})


@pytest.mark.parametrize("family", a_few(CLASSIFIERS))
def test_maps_are_those_of_the_backbone(family):
    name, arguments = SMALL[family]
    model = MODELS.build({"type": "VisionBackbone", "name": name, "in_channels": 4, **arguments})
    x = torch.randn(2, 4, 128, 128)
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.channels
    assert [128 // m.shape[2] for m in maps] == model.reductions
    sum(m.mean() for m in maps).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_out_indices():
    model = _build(out_indices=(1, 2), with_cp=True)
    assert all(stage.grad_checkpointing for stage in model.network.stages)
    assert model.channels == [64, 160]
    assert len(model.model.model.stages) == 3
    assert [m.shape[1] for m in model(torch.randn(1, 3, 64, 64))] == [64, 160]
    with pytest.raises(ValueError, match="4 feature maps"):
        _build(out_indices=(0, 4))


def test_out_norms_normalise_the_maps():
    model = _build(name="unireplknet_a", out_norms=True)
    for m in model(torch.randn(1, 3, 64, 64)):
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-5, rtol=0)


def _adapted(**kwargs: Any) -> VisionBackbone:
    """A single-resolution network of one block a stage with a ViT-Adapter."""
    torch.manual_seed(0)
    arguments = {"name": "vrwkv_t", "dim": 32, "depths": (1, 1, 1, 1)}
    adapter = {"num_heads": 2, "stem_dim": 8, **kwargs.pop("adapter", {})}
    return MODELS.build({"type": "VisionBackbone", **arguments, "adapter": adapter, **kwargs})


def test_adapter_makes_a_pyramid_of_one_resolution():
    model = _adapted(drop_path_rate=0.2, with_cp=True).train()
    assert model.channels == [32] * 4 and model.reductions == [4, 8, 16, 32]
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.2 / 3, 0.4 / 3, 0.2] + [0.2] * 6)
    assert model.model.grad_checkpointing and model.network.stages[0].grad_checkpointing
    maps = model(torch.randn(2, 3, 64, 96))
    assert isinstance(maps, tuple)
    assert [m.shape[2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    sum(m.square().mean() for m in maps).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match=r"leave out_indices unset, got \(0, 1\)"):
        _adapted(out_indices=(0, 1))
    with pytest.raises(TypeError, match="single-resolution"):
        MODELS.build(dict(type="VisionBackbone", name="van_b0", adapter={}))


def test_unknown_names_and_arguments():
    with pytest.raises(ValueError, match="did you mean.*'van_b2'"):
        VisionBackbone("van_b22")
    with pytest.raises(TypeError, match="did you mean 'norm_eps'"):
        VisionBackbone("van_b0", norm_epss=1e-5)
    with pytest.raises(ValueError, match="frozen_stages must be −1"):
        _build(frozen_stages=5)
    assert not any(p.requires_grad for p in _build(frozen_stages=4).parameters())
    with pytest.raises(ValueError, match="init_cfg must be dict"):
        _build(init_cfg=dict(type="Kaiming", layer="Conv2d"))


@pytest.mark.parametrize("adapted", [False, True])
def test_frozen_stages_stay_frozen(adapted):
    build = partial(_adapted, adapter={"drop_path_rate": 0.0}) if adapted else _build
    model = build(frozen_stages=1).train()
    before = copy.deepcopy(model.network.state_dict())
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        frozen = re.match(r"model\.(network|model)\.(stem|stages\.0)\.", name) is not None
        assert parameter.requires_grad == (not frozen) == (parameter.grad is not None)
    moved = {n for n, b in model.network.named_buffers() if not torch.equal(b, before[n])}
    assert adapted or moved
    assert not any(n.startswith(("stem.", "stages.0.")) for n in moved)


def test_synchronised_norms_can_be_frozen():
    """As mmengine makes them of plain ones under ``sync_bn``, which the configs set."""
    plain = _build(norm_eval=True)
    model = convert_sync_batchnorm(copy.deepcopy(plain), "torch").train()
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert not any(m.training for m in norms)
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(model.eval()(x), plain.eval()(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("build", "name", "arguments"),
    [
        (_build, "van_b0", {"depths": (1, 1, 2, 1)}),
        # Published detectors with VRWKV-T have layer scales, the classifier has none.
        (partial(_adapted, layer_scale=1.0), "vrwkv_t", {"dim": 32, "depths": (1, 1, 1, 1)}),
    ],
)
def test_init_cfg_loads_classifiers_and_detectors(build, name, arguments, tmp_path):
    path = tmp_path / "a.pth"
    classifier = backbones.create_model(name, **arguments).state_dict()
    torch.save({"state_dict": classifier}, path)
    init = dict(type="Pretrained", checkpoint=str(path))
    model = build(init_cfg=init)
    model.init_weights()
    for key, tensor in model.network.state_dict().items():
        if key in classifier:
            assert torch.equal(tensor, classifier[key])
        else:
            assert name == "vrwkv_t" and key.endswith("gamma") and (tensor == 1).all()
    detector = nn.ModuleDict({"backbone": model, "neck": nn.Conv2d(3, 3, 1)})
    torch.save({"state_dict": detector.state_dict(), "log": HistoryBuffer([1.0], [1])}, path)
    again = build(init_cfg=init)
    again.init_weights()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_init_cfg_names_published_weights():
    model = _build(
        name="favit_b0", init_cfg=dict(type="Pretrained", checkpoint="favit_b0.untrained")
    )
    with pytest.raises(backbones.CheckpointError, match="favit_b0 has no downloadable weights"):
        model.init_weights()


def test_only_mmengine_checkpoints_are_read(tmp_path):
    buffer = HistoryBuffer([np.float64(1.0), 3.0], [1, 1])
    torch.save({"log": buffer, "best": np.float64(0.5)}, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["log"].mean() == 2.0

    torch.save({"state_dict": {"a": torch.zeros(1)}, "evil": _Getattr()}, tmp_path / "b.pth")
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        torch.load(tmp_path / "b.pth", weights_only=True)
    with pytest.raises(backbones.CheckpointError):
        backbones.load_checkpoint(backbones.create_model("van_b0"), tmp_path / "b.pth")
    # After weights have been loaded, mmengine resumes.
    assert torch.load(tmp_path / "a.pth", weights_only=True)["log"].mean() == 2.0


class _Getattr:
    """Pickles as a read of an attribute of a class that weights-only loading knows."""

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (HistoryBuffer, "__init__")


def _rates(decay_rate: float, backbone: nn.Module) -> dict[str, tuple[float, float]]:
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Conv2d(4, 4, 1)})
    wrapper = build_optim_wrapper(
        model,
        ConfigDict(
            type="OptimWrapper",
            constructor="LayerDecayConstructor",
            optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.05),
            paramwise_cfg=dict(decay_rate=decay_rate),
        ),
    )
    groups = wrapper.optimizer.param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(len(g["params"]) for g in groups) == len(trained)
    return {n: found[id(p)] for n, p in trained.items()}


def test_layer_decay():
    """Stem, five blocks (the norm of a stage goes with its last one), then what is outside."""
    rates = _rates(0.5, _build())
    inside = "backbone.model.model."
    assert rates["head.weight"] == (1.0, 0.05)
    assert rates["head.bias"] == (1.0, 0.0)
    assert rates[f"{inside}stages.3.blocks.0.attn.proj_in.weight"] == (0.5, 0.05)
    assert rates[f"{inside}stages.3.norm.weight"] == (0.5, 0.0)
    assert rates[f"{inside}stages.3.downsample.conv.weight"] == (0.5, 0.05)
    assert rates[f"{inside}stages.2.blocks.1.mlp.fc1.weight"] == (0.25, 0.05)
    assert rates[f"{inside}stages.2.blocks.0.mlp.fc1.weight"] == (0.125, 0.05)
    assert rates[f"{inside}stages.0.blocks.0.mlp.fc1.weight"] == (0.5**5, 0.05)
    assert rates[f"{inside}stem.conv.weight"] == (0.5**6, 0.05)


def test_layer_decay_leaves_the_adapter_its_full_rate():
    """As in the published detectors: the stem is layer 0, the blocks follow, the rest is last."""
    rates = _rates(0.5, _adapted(frozen_stages=0))
    inside = "backbone.model.network."
    assert rates["backbone.model.adapter.up.weight"] == (1.0, 0.05)
    assert rates["backbone.model.adapter.level_embed"] == (1.0, 0.05)
    assert rates["backbone.model.adapter.norms.0.weight"] == (1.0, 0.0)
    assert rates[f"{inside}stages.3.blocks.0.mlp.key.weight"] == (0.5, 0.05)
    assert rates[f"{inside}stages.0.blocks.0.mlp.mix_k"] == (0.5**4, 0.05)
    assert not any(name.startswith(f"{inside}stem.") for name in rates)  # which is frozen


def test_layers_of_unireplknet_are_the_published_ones():
    """Of a backbone with 27 blocks in its third stage, which has 12 layers behind the stem."""
    with outlines():
        backbone = MODELS.build(dict(type="VisionBackbone", name="unireplknet_s"))
    rates = _rates(0.9, backbone)
    stage_layers = {0: 1, 1: 2, 3: 12}
    for name, _ in backbone.named_parameters():
        inner = name.removeprefix("model.model.")
        if inner.startswith("stem."):
            layer = 0
        else:
            stage, kind, block = re.match(r"stages\.(\d)\.(\w+)\.(\d+)", inner).groups()
            first = 0 if kind == "downsample" else int(block) // 3
            layer = 3 + first if stage == "2" else stage_layers[int(stage)]
        assert rates[f"backbone.{name}"][0] == pytest.approx(0.9 ** (13 - layer)), name


def test_layer_decay_skips_no_weight_decay_names():
    model = _build(name="efficientvit_m0", depths=(1, 1, 1), img_size=448)
    biases = {n: r for n, r in _rates(1.0, model).items() if n.endswith("attention_biases")}
    assert biases and set(biases.values()) == {(1.0, 0.0)}


@pytest.mark.parametrize("paramwise", [dict(decay_rate=0.0), dict(decay_rate=0.5, other=1)])
def test_layer_decay_refuses(paramwise):
    cfg = ConfigDict(
        type="OptimWrapper",
        constructor="LayerDecayConstructor",
        optimizer=dict(type="AdamW", lr=1.0),
        paramwise_cfg=paramwise,
    )
    with pytest.raises(ValueError, match="decay_rate"):
        build_optim_wrapper(nn.ModuleDict({"backbone": _build()}), cfg)


def test_check_channels():
    backbone = dict(type="VisionBackbone", name="van_b0")
    check_channels(dict(backbone=backbone, neck=dict(in_channels=[32, 64, 160, 256])))
    with pytest.raises(ValueError, match=r"neck.in_channels=\[64\].*write in_channels=\[32, 64"):
        check_channels(dict(backbone=backbone, neck=dict(in_channels=[64])))
    head = dict(in_channels=64, in_index=2)
    with pytest.raises(ValueError, match="auxiliary_head.in_channels=64.*write in_channels=160"):
        check_channels(dict(backbone=backbone, auxiliary_head=head))
    with pytest.raises(ValueError, match="returns 4 maps: write one of 0 … 3"):
        check_channels(dict(backbone=backbone, auxiliary_head=dict(in_channels=1, in_index=4)))
    head = dict(in_channels=[32, 256], in_index=[0, 3], input_transform="resize_concat")
    check_channels(dict(backbone=backbone, decode_head=head))
    check_channels(dict(backbone=backbone, decode_head=dict(in_channels=256)))  # mmseg's default
    with pytest.raises(ValueError, match=r"decode_head.in_index=\[0, 9\].*write some of 0 … 3"):
        check_channels(dict(backbone=backbone, decode_head=head | dict(in_index=[0, 9])))
    with pytest.raises(ValueError, match=r"in_channels=32 .*write in_channels=\[32, 256\]"):
        check_channels(dict(backbone=backbone, decode_head=head | dict(in_channels=32)))
    with pytest.raises(ValueError, match=r"in_channels=None .*write in_channels=\[32, 64, 160, "):
        check_channels(dict(backbone=backbone, neck=dict(type="FPN")))
    heads = [dict(in_channels=160, in_index=2), dict(in_channels=160, in_index=1)]
    with pytest.raises(ValueError, match=r"auxiliary_head\[1\].in_channels=160.*in_channels=64"):
        check_channels(dict(backbone=backbone, auxiliary_head=heads))
    necks = [dict(in_channels=[32, 64, 160, 256]), dict(in_channels=128)]
    check_channels(dict(backbone=backbone, neck=necks))
