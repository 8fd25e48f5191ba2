"""torchvision's detectors over our pyramids: the page's models learn boxes and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from zoo import CLASSIFIERS, ISOTROPIC, SMALL, STRIDE_16

import backbones

Train = Callable[..., list[float]]
Page = Callable[[str], dict[str, Any]]
Pictures = tuple[Tensor, Tensor, Tensor]


def _loss(model: Any, pictures: Pictures) -> Callable[[], Tensor]:
    images, masks, boxes = pictures
    targets = [
        {"boxes": box[None], "labels": torch.tensor([1]), "masks": mask[None].to(torch.uint8)}
        for mask, box in zip(masks, boxes, strict=True)
    ]
    return lambda: sum(model(list(images), targets).values())


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
def test_detectors_of_the_page_learn(name, run_page, rectangles, train):
    model = run_page("torchvision")[name]
    model.transform.min_size = (64,)
    steps, lr = 5, 2e-4
    if name == "mask_rcnn":
        # Fewer regions, as befits one object an image.
        model.rpn._pre_nms_top_n = {"training": 100, "testing": 50}
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        model.roi_heads.detections_per_img = 10
        steps, lr = 4, 1e-4
    two = tuple(values[:2] for values in rectangles)
    losses = train(model, _loss(model, two), steps, lr)
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    found = model.eval()(list(rectangles[0]))
    assert len(found) == 4 and all(f["boxes"].shape[1:] == (4,) for f in found)
    if name == "mask_rcnn":
        assert all(f["masks"].shape[1:] == (1, 64, 64) for f in found)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_every_family_makes_a_pyramid(family, run_page):
    name, arguments = SMALL[family]
    if family in STRIDE_16:
        arguments = {**arguments, "stem_features": True, "out_indices": (1, 2, 3, 4)}
    elif family in ISOTROPIC:
        arguments = {**arguments, "pyramid": True}
    page = run_page("torchvision")
    body = backbones.create_model(name, features_only=True, **arguments)
    fpn = page["FeaturePyramidNetwork"](body.feature_info.channels(), 256, LastLevelMaxPool())
    pyramid = page["Pyramid"]({"body": body, "fpn": fpn})
    maps = pyramid(torch.randn(2, 3, 64, 64))
    assert [x.shape[1:] for x in maps.values()] == [(256, s, s) for s in (16, 8, 4, 2, 1)]
    sum(x.mean() for x in maps.values()).backward()
    stem = [p for n, p in pyramid.named_parameters() if ".stem." in n]
    assert stem and all(p.grad is not None for p in stem)
