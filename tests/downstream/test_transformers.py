"""transformers: UPerNet and classifiers over our names learn, are saved, pushed and loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import CLASSIFIERS, SMALL, STRIDE_16

Train = Callable[..., list[float]]
Page = Callable[[str], dict[str, Any]]
Pictures = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    """The library, imported only by a worker that runs these tests: it takes seconds."""
    return importlib.import_module("transformers")


def test_segmenter_of_the_page_learns(transformers, run_page, rectangles, train):
    model = run_page("transformers")["segmenter"]
    assert type(model.backbone) is transformers.TimmBackbone
    assert type(model.backbone._backbone.model).__module__ == "backbones.van"
    images, masks = (values[:2] for values in rectangles[:2])
    losses = train(model, lambda: model(pixel_values=images, labels=masks).loss, 5, lr=6e-4)
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_classifier_of_the_page_learns(run_page, rectangles, train):
    model = run_page("transformers")["classifier"]
    assert type(model.timm_model).__module__ == "backbones.van"
    images, labels = rectangles[0], torch.tensor([0, 0, 1, 1])
    images = images * torch.tensor([1.0, 1, -1, -1])[:, None, None, None]
    losses = train(model, lambda: model(pixel_values=images, labels=labels).loss, 4, lr=1e-3)
    assert sum(losses[-2:]) < 0.6 * sum(losses[:2])


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_round_trip_of_every_family(transformers, family, tmp_path):
    name, arguments = SMALL[family]
    if family in STRIDE_16:
        name += "_pyramid"
    elif family == "inception_next":
        # timm's own model, which cannot be made shallow.
        arguments = {}
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=3, model_args=arguments)
    classifier = transformers.TimmWrapperForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    saved = classifier.state_dict()
    assert saved.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, saved[n]) for n, tensor in again.state_dict().items())
    # The file's tensors lie otherwise in memory, and convolutions then round otherwise.
    torch.testing.assert_close(again(x).logits, classifier(x).logits)

    maps = transformers.TimmBackbone(
        transformers.TimmBackboneConfig(backbone=name, out_indices=[1, 2]), **arguments
    ).eval()
    assert [m.shape[1] for m in maps(x).feature_maps] == maps.channels


def test_restoration_is_refused(transformers):
    with pytest.raises(ValueError, match="HAT has no classifier"):
        transformers.TimmWrapperForImageClassification(
            transformers.TimmWrapperConfig(architecture="hat_s_x2", num_labels=2)
        )
