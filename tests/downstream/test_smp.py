"""segmentation-models-pytorch: every family as a ``tu-`` encoder, and the page's models, learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CLASSIFIERS, ISOTROPIC, SMALL, STRIDE_16

import backbones

Train = Callable[..., list[float]]
Page = Callable[[str], dict[str, Any]]
Pictures = tuple[Tensor, Tensor, Tensor]


def _learn(
    model: nn.Module, pictures: Pictures, train: Train, steps: int = 5, lr: float = 2e-3
) -> None:
    images, masks = (values[:2] for values in pictures[:2])
    losses = train(model, lambda: F.cross_entropy(model(images), masks), steps, lr)
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])


# Decoders narrower than the default, as befits the pictures.
DECODERS = {
    smp.Unet: {"decoder_channels": (64, 32, 16, 16, 8)},
    smp.FPN: {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32},
    smp.UPerNet: {"decoder_channels": 64},
}


@pytest.mark.parametrize(
    "segmenter",
    [
        smp.Unet,
        pytest.param(smp.FPN, marks=pytest.mark.slow),
        pytest.param(smp.UPerNet, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_every_family_learns(family, segmenter, rectangles, train):
    name, arguments = SMALL[family]
    if family in STRIDE_16 + ISOTROPIC:
        name += "_pyramid"
    elif family == "inception_next":
        # timm's own model, which cannot be made shallow.
        arguments = {}
    torch.manual_seed(0)
    model = segmenter(
        f"tu-{name}", encoder_weights=None, classes=2, **DECODERS[segmenter], **arguments
    )
    strides = [64 // x.shape[-1] for x in model.encoder(rectangles[0])]
    assert strides == [1, 2, 4, 8, 16, 32]
    # Narrow pyramids learn more slowly than a U-Net, and only slow tests have the time.
    _learn(model, rectangles, train, steps=5 if segmenter is smp.Unet else 10)


@pytest.mark.parametrize("name", ["unet", "fpn", "upernet"])
def test_models_of_the_page_learn(name, run_page, rectangles, train):
    model = run_page("segmentation-models-pytorch")[name]
    inside = model.encoder.model.model
    assert type(inside).__module__.startswith("backbones.")
    _learn(model, rectangles, train, steps=8, lr=1e-3)


def test_the_pyramid_is_the_same_network():
    torch.manual_seed(0)
    plain = backbones.create_model("shvit_s1", features_only=True, stem_features=True)
    torch.manual_seed(0)
    pyramid = timm.create_model("shvit_s1_pyramid", features_only=True)
    assert pyramid.feature_info.reduction() == [2, 4, 8, 16, 32, 64]
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(plain.eval()(x), pyramid.eval()(x), strict=True):
        assert torch.equal(a, b)
    assert timm.models.is_model_pretrained("shvit_s1_pyramid.in1k")
    assert "shvit_s1_pyramid" not in backbones.list_models()


def test_what_has_no_pyramid_is_refused():
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        smp.Unet("tu-hat_s_x2", encoder_weights=None)
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        smp.Unet("tu-shvit_s1", encoder_weights=None)
