"""Networks unlike the one that represents their family: sizes, ``fuse()``, gradients, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import images, randomise

import backbones
from backbones.cli.parity import relative_error

NETWORKS: dict[str, dict[str, Any]] = {
    "eca_mobilenet_v2": {"dims": ((16,), (24, 24), (32, 96), (104,))},
    "eca_resnet18": {"dims": (32, 48, 64, 96), "depths": (1, 1, 2, 1)},
    "vanilla_vmamba_tiny": {"dims": (48, 64, 96, 128), "depths": (1, 1, 2, 1)},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> Any:
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=10, drop_path_rate=0.0, **NETWORKS[name])
    return randomise(model).eval()


@every_network
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 97)])
@torch.no_grad()
def test_maps_of_any_size_and_the_fused_form(name, size):
    model = network(name)
    x = images(2, 3, *size)
    last, maps = model.forward_intermediates(x)
    # The first version of VMamba drops incomplete patches of 4×4.
    sides = [side // 4 * 4 for side in size] if name.startswith("vanilla") else size
    for info, feature in zip(model.feature_info, maps, strict=True):
        assert feature.shape[1] == info["num_chs"]
        assert feature.shape[2:] == tuple(-(-side // info["reduction"]) for side in sides)
    expected = model.forward_head(last)
    fused = backbones.fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    for _ in range(3):  # plain, captured, replayed
        assert relative_error(fused(x), expected) <= 1e-5
    assert fused.is_replayed


@every_network
@torch.no_grad()
def test_fewer_bits(name):
    x = images(2, 3, 64, 64)
    expected = network(name)(x)
    half = network(name).fuse(dtype=torch.bfloat16)
    assert relative_error(half(x.bfloat16()), expected) <= 0.05
    quantized = network(name).fuse(dtype=torch.int8)
    dtype = next(quantized.parameters()).dtype
    assert relative_error(quantized(x.to(dtype)), expected) <= 0.1


@every_network
def test_gradients_of_an_image_alone(name):
    model = network(name)
    x = images(2, 3, 36, 64)
    whole = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)[0]
    for i in range(2):
        one = x[i : i + 1].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        alone = torch.autograd.grad(model(one).square().sum(), one)[0]
        assert relative_error(alone[0], whole[i]) <= 1e-4


@every_network
@torch.no_grad()
def test_export(name):
    model, x = network(name), images(1, 3, 36, 60)
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
