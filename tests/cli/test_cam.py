"""Grad-CAM highlights the cause, in every family and at any size."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from gradient_law import FORMATS
from torch import Tensor, nn
from zoo import CLASSIFIERS, images, randomise, small

from backbones.cli.cam import grad_cam, upsample_heat
from backbones.cli.receptive_field import ReceptiveField, follow
from backbones.core.stage import map_of
from backbones.overlock import OverviewStage

NORMS = ("LayerNorm", "LayerNorm2d", "SEModule")


class Widen(nn.Module):
    """As many channels as wanted, each the mean of those before."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand(-1, self.dim, -1, -1)


def simple(family: str) -> Any:
    """Stem, downsampling and head of a family with weights all alike and no biases.

    What is bright in the image is bright in the maps, at the same place; a black image gives 0.
    """
    model = small(family).double().eval()
    before = model.stem(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).shape[1]
    for stage, number in zip(model.stages, model.stage_features(), strict=True):
        dim = model.feature_info[number]["num_chs"]
        blocks, stage.blocks = stage.blocks, nn.Sequential()
        if family == "medvitv2":  # whose blocks change the number of channels
            stage.blocks.append(Widen(dim))
        elif isinstance(stage, OverviewStage):  # which still needs an overview
            overview = blocks[stage.base_depth]
            overview.blocks, stage.base_depth = nn.Sequential(), 0
            stage.blocks.append(overview)
        elif family in ("ecanet", "proxylessnas"):  # whose first blocks downsample
            stride = 1 if (family, number) == ("ecanet", 0) else 2
            stage.blocks.append(nn.Conv2d(before, dim, 3, stride, 1, bias=False).double())
        before = dim
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in NORMS or isinstance(
                child, nn.ReLU6
            ):  # cuts off what is bright
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):  # chooses one of the bright pixels
                setattr(module, name, nn.AvgPool2d(3, 2, 1))
    for name, parameter in model.named_parameters():
        # What a context adds is spread over the map.
        zero = name.endswith(("bias", "pos_embed", "blocks.0.proj.weight")) or "offset" in name
        nn.init.constant_(parameter, 0.0 if zero else 0.1)
    return model


def middle(heat: Tensor) -> tuple[float, float]:
    """Centre of mass of (H, W), in pixels from the upper left corner."""
    rows, columns = heat.sum(1).double(), heat.sum(0).double()
    return tuple(((torch.arange(len(m)) + 0.5) * m / m.sum()).sum().item() for m in (rows, columns))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_grid_of_every_map(family):
    # Of the whole model, blocks included, against where gradients of the simple one come from.
    whole, model = small(family).eval(), simple(family)
    stride = whole.feature_info[-1]["reduction"]
    size = 8 * stride + 5, 9 * stride + 11  # so that borders are far away, and a part of a cell
    picture = torch.ones(1, 3, *size, dtype=torch.float64, requires_grad=True)
    field, x, y = ReceptiveField(), picture.detach().float(), picture
    with torch.no_grad(), follow(whole, field):
        x = whole.stem(x)
    y = model.stem(y)
    for number, stage in enumerate(whole.stages):
        with torch.no_grad(), follow(whole, field):
            x = stage(x)
        y = model.stages[number](y)
        assert map_of(x).shape[2:] == map_of(y).shape[2:]
        row, column = (side // 2 for side in map_of(y).shape[2:])
        (gradient,) = torch.autograd.grad(map_of(y)[0, 0, row, column], picture, retain_graph=True)
        expected = [field.start + i * field.stride for i in (row, column)]
        assert middle(gradient[0].sum(0)) == pytest.approx(expected, abs=1e-6)
        info = whole.feature_info[whole.stage_features()[number]]
        assert field.stride == info["reduction"]


def test_heat_of_one_cell():
    # Sizes that 32 does not divide; cells on pixels, as after padded convolutions, and between.
    for start, size in ((0.5, (110, 139)), (16.0, (131, 170))):
        cells = torch.zeros(1, 4, 5)
        cells[0, 1, 2] = 1
        heat = upsample_heat(cells, size, start, 32)
        assert heat.shape == (1, *size)
        assert middle(heat[0]) == pytest.approx([start + 32, start + 64], abs=1e-4)
        assert (heat.sum(0) > 0).sum(0).max() == 63 + (start == 16.0)
    # Beyond the outermost cells nothing changes.
    even = torch.full((2, 3, 3), 0.7)
    torch.testing.assert_close(upsample_heat(even, (99, 70), 0.5, 32), torch.full((2, 99, 70), 0.7))


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_heat_of_every_family(family, memory_format):
    """It does not depend on the batch."""
    model = randomise(small(family, num_classes=4)).double().eval()
    model.to(memory_format=FORMATS[memory_format])
    # The last maps are too coarse to show: gradients come through the stages behind.
    x = images(2, 3, 72, 88).double().contiguous(memory_format=FORMATS[memory_format])
    logits, heat = grad_cam(model, x)
    torch.testing.assert_close(logits, model(x))
    assert heat.shape == (2, 72, 88) and heat.min() >= 0 and heat.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = [
        torch.cat(parts) for parts in zip(*map(partial(grad_cam, model), x.split(1)), strict=True)
    ]
    for given, wanted in zip(alone, (logits, heat), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)


def test_it_finds_what_matters():
    # The logit of class 0 is the mean of the last map's first channel: heat is that channel.
    model = small("van", num_classes=2).eval()
    torch.nn.init.zeros_(model.head.fc.weight)
    with torch.no_grad():
        model.head.fc.weight[0, 0] = 1
    picture = images(1, 3, 160, 160)
    _, heat = grad_cam(model, picture, torch.tensor([0]))
    channel = upsample_heat(model.forward_features(picture)[:, 0].relu(), (160, 160), 0.5, 32)
    torch.testing.assert_close(heat, channel / channel.max())
