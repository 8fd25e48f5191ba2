"""InceptionNeXt beyond the contract: its head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import images, outlines

import backbones


def test_published_defaults():
    with outlines():
        model = backbones.create_model("inception_next_base_384")
        atto = backbones.create_model("inception_next_atto")
    rates = (model.head.drop.p, model.stages[-1].blocks[-1].drop_path.drop_prob)
    assert rates == pytest.approx((0.5, 0.7))
    assert model.default_cfg["input_size"] == (3, 384, 384)
    assert atto.stages[0].blocks[0].token_mixer.dwconv_w.kernel_size == (1, 9)


@torch.no_grad()
def test_head_keeps_its_width():
    model = backbones.create_model("inception_next_atto").eval()
    model.reset_classifier(4, "max")
    assert model(images(1, 3, 64, 64)).shape == (1, 4)
    with pytest.raises(ValueError, match="'catavgmax' changes the input width"):
        model.reset_classifier(4, "catavgmax")
    with pytest.raises(ValueError, match="num_classes must be 0, got 4"):
        model.reset_classifier(4, "")
    assert isinstance(model.get_classifier(), nn.Linear)
