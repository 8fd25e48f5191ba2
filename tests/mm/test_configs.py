"""Every config of a detector or segmenter builds what its file name says, and can be trained."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    TRANSFORMS,
    Registry,
    init_default_scope,
)
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from zoo import SMALL, outlines

import backbones
from backbones import openmmlab
from backbones.openmmlab import VisionBackbone, check_channels, without_sync_norm

ROOT = Path(__file__).parents[2] / "configs"
LEAVES = sorted(path for kind in ("det", "seg") for path in ROOT.glob(f"{kind}/[a-z]*/*.py"))
HEADS = {
    "retinanet": "RetinaNet",
    "mask-rcnn": "MaskRCNN",
    "cascade-mask-rcnn": "CascadeRCNN",
    "fpn": "FPNHead",
    "upernet": "UPerHead",
}
# One of each head and family that is small enough for every run.
TRAINED = {
    *("fpn_van-b0", "cascade-mask-rcnn_unireplknet-t", "retinanet_efficientvit-m4"),
    *("mask-rcnn_shvit-s4", "fpn_favit-b0", "fpn_medvitv2-tiny", "fpn_biformer-small"),
    *("fpn_litv2-s", "fpn_ravlt-t", "fpn_inception-next-tiny", "mask-rcnn_nat-mini"),
    *("upernet_overlock-t", "upernet_dinat-s-tiny", "upernet_vrwkv-t"),
    "mask-rcnn_vmamba-tiny-s1l8",
}
# Whose head and family are each trained in another one.
QUICK = TRAINED | {
    *("mask-rcnn_overlock-t", "upernet_van-b0", "retinanet_van-b0", "mask-rcnn_van-b0"),
    "upernet_unireplknet-t",
}


def _key(path: Path) -> str:
    return "_".join(path.stem.split("_")[:2])


def _ids(path: Path) -> str:
    return path.stem


_known: dict[str, SimpleNamespace] = {}


def _backbone(family: str, **arguments: Any) -> SimpleNamespace:
    """Most are those of several configs; what their maps are is found out once.

    That does not depend on the number of blocks, except that adapters and dilations count them.
    """
    if not {"adapter", "dilations"} & arguments.keys():
        arguments["depths"] = SMALL[family][1]["depths"]
    assert 0 <= arguments.pop("drop_path_rate", 0.0) < 1
    key = repr(sorted(arguments.items()))
    if key not in _known:
        with outlines():
            _known[key] = SimpleNamespace(channels=VisionBackbone(**arguments).channels)
    return _known[key]


@pytest.mark.parametrize("path", LEAVES, ids=_ids)
def test_headers_of_configs(path, monkeypatch):
    monkeypatch.setattr(openmmlab, "VisionBackbone", partial(_backbone, path.parent.name))
    text = path.read_text()
    assert len(text.splitlines()) <= 16
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None and "https://arxiv.org/abs/" in docstring
    assert re.search(r"(AP|mIoU) \d\d\.\d\b|no published", docstring)
    cfg = Config.fromfile(path)
    name = cfg.model.backbone.name
    assert name in backbones.list_models(family=path.parent.name)
    assert _key(path).split("_")[1].removesuffix("-22k") == name.replace("_", "-")
    checkpoint = cfg.model.backbone.get("init_cfg", {}).get("checkpoint", f"{name}.")
    assert checkpoint.startswith((f"{name}.", "https://"))
    check_channels(cfg.model)
    head = cfg.model.get("decode_head", cfg.model).type
    assert head == HEADS[path.stem.split("_")[0]]
    if head.endswith("Head"):
        batch, height, width = re.findall(r"xb(\d+)-.*-(\d+)x(\d+)$", path.stem)[0]
        assert cfg.train_dataloader.batch_size == int(batch)
        assert cfg.crop_size == cfg.model.data_preprocessor.size == (int(height), int(width))


@pytest.mark.parametrize("path", [p for p in LEAVES if _key(p) in QUICK], ids=_ids)
def test_data_steps_and_hooks_exist(path):
    """Without the data: their steps, hooks, metrics and the optimizer's constructor."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)

    def known(registry: Registry, kind: str) -> bool:
        with registry.switch_scope_and_registry(cfg.default_scope) as inner:
            return inner.get(kind) is not None

    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert all(known(TRANSFORMS, step.type) for step in loader.dataset.pipeline)
        assert loader.dataset.pipeline[-1].type.startswith("Pack")
        assert known(DATASETS, loader.dataset.type)
    hooks = [*cfg.default_hooks.values(), *cfg.get("custom_hooks", [])]
    assert all(known(HOOKS, hook.type) for hook in hooks)
    assert known(METRICS, cfg.val_evaluator.type)
    constructor = cfg.optim_wrapper.get("constructor", "DefaultOptimWrapperConstructor")
    assert OPTIM_WRAPPER_CONSTRUCTORS.get(constructor) is not None
    assert (constructor == "LayerDecayConstructor") == (
        path.parent.name in ("unireplknet", "vrwkv")
    )
    ends = {"1x": 12, "3x": 36, "40k": 40_000, "80k": 80_000, "160k": 160_000}
    length = cfg.train_cfg.get("max_epochs", cfg.train_cfg.get("max_iters"))
    assert length in [n for word, n in ends.items() if f"_{word}_" in path.stem.replace("-", "_")]


def _shrink(model: Any) -> None:
    """Fewer regions, as befits images of 64×64."""
    rcnn = model.get("train_cfg", {}).get("rcnn")
    for stage in rcnn if isinstance(rcnn, list) else [rcnn] if rcnn else []:
        stage.sampler.num = 8
    if rcnn:
        model.train_cfg.rpn_proposal.max_per_img = 16


def _train_once(path: Path, **backbone: Any) -> None:
    cfg = without_sync_norm(Config.fromfile(path))
    detects = cfg.default_scope == "mmdet"
    init_default_scope(cfg.default_scope)
    _shrink(cfg.model)
    cfg.model.backbone.pop("init_cfg", None)
    cfg.model.backbone.update(backbone)
    torch.manual_seed(0)
    if detects:
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS

        cfg.model.data_preprocessor.size = (64, 64)
    model = MODELS.build(cfg.model).train()
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    samples = [_detection() if detects else _segmentation() for _ in images]
    data = model.data_preprocessor({"inputs": images, "data_samples": samples}, training=True)
    losses = model(**data, mode="loss")
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    total.backward()
    stemmed = [p for n, p in model.backbone.named_parameters() if ".stem." in n]
    assert stemmed and all(p.grad is not None and p.grad.isfinite().all() for p in stemmed)


def _detection() -> DetDataSample:
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0))
    )
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[:, 8:56, 8:48] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 48.0, 56.0]]),
        labels=torch.tensor([1]),
        masks=BitmapMasks(mask, 64, 64),
    )
    return sample


def _segmentation() -> SegDataSample:
    sample = SegDataSample(metainfo=dict(img_shape=(64, 64)))
    sample.gt_sem_seg = PixelData(data=torch.arange(64).expand(1, 64, 64) // 32)
    return sample


@pytest.mark.parametrize(
    "path", {_key(p): p for p in LEAVES if _key(p) in TRAINED}.values(), ids=_ids
)
def test_forward_and_backward(path):
    """With few blocks, whose number the heads do not see."""
    _train_once(path, depths=SMALL[path.parent.name][1]["depths"])


@pytest.mark.slow
@pytest.mark.parametrize("path", LEAVES, ids=_ids)
def test_forward_and_backward_of_the_whole_network(path):
    _train_once(path)


@pytest.mark.parametrize(("size", "name"), [("t", "vig_t"), ("s", "vig_s"), ("s", "vitrpb_small")])
def test_configs_of_vision_rwkv_fit_other_networks(size, name):
    """Which have the same width and depth, as the guide shows."""
    cfg = Config.fromfile(ROOT / f"det/vrwkv/mask-rcnn_vrwkv-{size}_fpn_1x_coco.py")
    other = dict(_delete_=True, type="VisionBackbone", name=name, adapter=dict(num_heads=6))
    cfg.merge_from_dict(dict(model=dict(backbone=other)))
    assert cfg.model.backbone.name == name
    check_channels(cfg.model)


def test_every_quick_name_exists():
    assert {_key(path) for path in LEAVES} >= QUICK
