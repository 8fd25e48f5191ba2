"""With the heads of the configs, too, an image's gradient alone is that within a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_law import FORMATS, Case, alone, assert_same, freeze_norms, gradients
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from zoo import SMALL, images, randomise

from backbones.openmmlab import without_sync_norm

ROOT = Path(__file__).parents[2] / "configs"
# Each kind of head, with batch norms in the heads or in the backbone alone.
CONFIGS = {
    "det/efficientvit/retinanet_efficientvit-m4_fpn_1x_coco.py",
    "det/shvit/mask-rcnn_shvit-s4_fpn_1x_coco.py",
    "seg/medvitv2/fpn_medvitv2-tiny_1xb2-40k_medical-256x256.py",
    "seg/van/upernet_van-b0_8xb2-160k_ade20k-512x512.py",
}


def build(path: str, memory_format: str) -> nn.Module:
    """Shallow, in train mode, with frozen norms and without anything random."""
    cfg = without_sync_norm(Config.fromfile(ROOT / path))
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == "mmdet":
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    family = path.split("/")[1]
    for name in ("decode_head", "auxiliary_head"):
        if name in cfg.model:
            cfg.model[name].channels = 32
    cfg.model.backbone.pop("init_cfg", None)
    cfg.model.backbone.update(drop_path_rate=0.0, depths=SMALL[family][1]["depths"])
    torch.manual_seed(0)
    model = randomise(MODELS.build(cfg.model)).train()
    freeze_norms(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return model.to(memory_format=FORMATS[memory_format])


def tensors(outs: Any) -> Iterator[Tensor]:
    """Those of nested lists, in turn."""
    if isinstance(outs, Tensor):
        yield outs
    else:
        for out in outs:
            yield from tensors(out)


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda p: Path(p).stem.split("_fpn_")[0])
@pytest.mark.parametrize(
    "memory_format", ["contiguous", pytest.param("channels_last", marks=pytest.mark.slow)]
)
def test_alone_as_in_a_batch(path, memory_format):
    model = build(path, memory_format)
    names = ("decode_head", "auxiliary_head", "bbox_head", "rpn_head")
    heads = [getattr(model, name) for name in names if getattr(model, name, None) is not None]

    def objective(x: Tensor) -> Tensor:
        maps = model.extract_feat(x)
        outs = [*tensors(maps), *(out for head in heads for out in tensors(head(maps)))]
        return sum((o * images(1, *o.shape[1:], seed=i)).sum() for i, o in enumerate(outs))

    x = images(2, 3, 64, 96).contiguous(memory_format=FORMATS[memory_format])
    case = Case(path.split("/")[1], "frozen", memory_format)
    assert_same(alone(objective, x, model), gradients(objective, x, model), case, model)
