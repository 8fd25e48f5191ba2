"""Networks unlike the one that represents their family: sizes, ``fuse()``, gradients, export."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_kernels import without_kernels
from zoo import SMALL, images, randomise

import backbones
from backbones.cli.parity import relative_error

_SHALLOW = {"depths": (1, 1, 1, 1)}
_STL = {"dims": (64, 96, 128, 192), **_SHALLOW}
_VRWKV = {"dim": 64, **_SHALLOW}
# By an identifier, the variant and its arguments.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "biformer_stl": ("biformer_stl", _STL),
    "biformer_stl_nchw": ("biformer_stl_nchw", _STL),
    "eca_mobilenet_v2": ("eca_mobilenet_v2", {"dims": ((16,), (24, 24), (32, 96), (104,))}),
    "eca_resnet18": ("eca_resnet18", {"dims": (32, 48, 64, 96), "depths": (1, 1, 2, 1)}),
    "vitrpb": (
        "vitrpb_small",
        {"dim": 16, "num_heads": 2, "kernel_size": None, "map_size": 6, **_SHALLOW},
    ),
    "unireplknet pattern": (
        "unireplknet_a",
        {**SMALL["unireplknet"][1], "depths": (1, 1, 3, 1), "kernel_sizes": (5, 7, (9, 3), 11)},
    ),
    "vanilla_vmamba": ("vanilla_vmamba_tiny", {"dims": (48, 64, 96, 128), "depths": (1, 1, 2, 1)}),
    "vig_t": ("vig_t", {"dim": 64, "num_heads": 2, "depths": (2, 1, 1, 1)}),
    "vrwkv6": ("vrwkv6_t", _VRWKV),
    "vrwkv6 post": ("vrwkv6_t", {**_VRWKV, "post_norm": True, "layer_scale": 0.3}),
    "vrwkv post": (
        "vrwkv_t",
        {**_VRWKV, "post_norm": True, "layer_scale": 0.3, "key_norm": True, "segments": 0},
    ),
    "vrwkv scaled": ("vrwkv_t", {**_VRWKV, "layer_scale": 0.3}),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> Any:
    torch.manual_seed(0)
    variant, arguments = NETWORKS[name]
    model = backbones.create_model(variant, num_classes=10, drop_path_rate=0.0, **arguments)
    return randomise(model).eval()


def _side(name: str, side: int, stride: int) -> int:
    """Of a map; some stems drop what is left of the image behind the last whole patch."""
    if name.startswith("vig"):
        return -(-side // 8) // 2
    side = side // 4 * 4 if name.startswith("vanilla") else side
    return side // stride if name.startswith("biformer") else -(-side // stride)


@every_network
@torch.no_grad()
def test_maps_of_any_size_and_the_fused_form(name, monkeypatch):
    plain = network(name)
    fused = backbones.fuse(copy.deepcopy(plain))
    for size in ((33, 47), (64, 97)):
        x = images(2, 3, *size)
        last, maps = plain.forward_intermediates(x)
        for info, feature in zip(plain.feature_info, maps, strict=True):
            sides = [_side(name, side, info["reduction"]) for side in size]
            assert list(feature.shape[1:]) == [info["num_chs"], *sides]
        expected = plain.forward_head(last)
        for _ in range(3):  # plain, captured, replayed
            assert relative_error(fused(x), expected) <= 1e-5
        assert fused.is_replayed
        for value, whole in zip(fused.forward_intermediates(x)[1], maps, strict=True):
            assert relative_error(value, whole) <= 1e-4
    without_kernels(monkeypatch)
    assert relative_error(plain.fuse()(x), expected) <= 1e-5


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
    """Within a batch, in another memory format, and through the fused form, which gives it too."""
    model = network(name)
    x = images(2, 3, 36, 64)
    whole = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)[0]
    for i in range(2):
        one = x[i : i + 1].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        alone = torch.autograd.grad(model(one).square().sum(), one)[0]
        assert relative_error(alone[0], whole[i]) <= 1e-4
    fused = torch.autograd.grad(model.fuse()(x).square().sum(), x)[0]
    assert relative_error(fused, whole) <= 1e-4


@pytest.mark.parametrize("name", ["eca_mobilenet_v2", "eca_resnet18", "vanilla_vmamba"])
@torch.no_grad()
def test_export(name):
    model, x = network(name), images(1, 3, 36, 60)
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
