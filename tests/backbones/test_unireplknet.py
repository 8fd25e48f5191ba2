"""UniRepLKNet: merged checkpoints, heads of ImageNet-22k, layer decay, videos."""

from __future__ import annotations

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor
from zoo import outlines

import backbones
from backbones.cli.parity import checkpoint, image, reference, relative_error, tolerance

TOLERANCE = tolerance("unireplknet")
QUICK = ("unireplknet_a", "unireplknet_n")
VARIANTS = [
    pytest.param(f"unireplknet_{size}", marks=[] if f"unireplknet_{size}" in QUICK else slow)
    for slow in [pytest.mark.slow]
    for size in ("a", "f", "p", "n", "t", "s", "b", "l", "xl")
]


def merged_by_the_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published merging, from its names to its names."""

    def affine(norm: str) -> tuple[Tensor, Tensor]:
        scale = tensors[f"{norm}.weight"] * (tensors[f"{norm}.running_var"] + 1e-5).rsqrt()
        return scale, tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale

    merged = dict(tensors)
    blocks = {
        n.removesuffix(".gamma") for n, t in tensors.items() if n.endswith(".gamma") and t.ndim == 1
    }
    for block in blocks:
        outer, outer_shift = affine(f"{block}.norm")
        conv = f"{block}.dwconv"
        if f"{conv}.lk_origin.weight" in tensors:
            conv += ".lk_origin"
            scale, bias = affine(f"{block}.dwconv.origin_bn")
            kernel = tensors[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
            for name in tensors:
                if not name.startswith(f"{block}.dwconv.dil_conv_k") or "weight" not in name:
                    continue
                scale, shift = affine(name.removesuffix(".weight").replace("conv_k", "bn_k"))
                dilation = int(name.removesuffix(".weight").rsplit("_", 1)[1])
                small = tensors[name] * scale.view(-1, 1, 1, 1)
                for i in range(small.shape[2]):
                    for j in range(small.shape[2]):
                        y, x = (6 + dilation * (n - small.shape[2] // 2) for n in (i, j))
                        kernel[:, :, y, x] += small[:, :, i, j]
                bias = bias + shift
        else:
            kernel, bias = tensors[f"{conv}.weight"], torch.zeros(())
        merged[f"{conv}.weight"] = kernel * outer.view(-1, 1, 1, 1)
        merged[f"{conv}.bias"] = bias * outer + outer_shift
        scale, shift = affine(f"{block}.pwconv2.2")
        gamma, weight = tensors[f"{block}.gamma"], tensors[f"{block}.pwconv2.0.weight"]
        through = weight @ tensors[f"{block}.act.1.beta"].flatten()
        merged[f"{block}.pwconv2.0.weight"] = weight * (scale * gamma).view(-1, 1)
        merged[f"{block}.pwconv2.0.bias"] = (through * scale + shift) * gamma
    gone = [f"{block}.gamma" for block in blocks]
    parts = (".norm.", "_bn", "dil_conv", ".pwconv2.2.", ".act.1.beta")
    return {n: t for n, t in merged.items() if n not in gone and not any(p in n for p in parts)}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_merged_checkpoints(variant):
    figures = reference("unireplknet", variant)
    tensors = merged_by_the_original(checkpoint(figures))
    rows = {name: shape for name, shape, _ in figures["deploy"]["state_dict"]}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == rows
    case = figures["cases"][0]
    x = image(case["input"], case["seed"])
    fresh = backbones.create_model(variant).eval()
    backbones.load_checkpoint(fresh, tensors)
    assert fresh.fused
    assert sum(p.numel() for p in fresh.parameters()) == figures["deploy"]["params"]
    logits = fresh(x)
    assert relative_error(logits, case["logits"]) <= TOLERANCE
    if variant in QUICK:
        fused = backbones.create_model(variant).eval().fuse()
        backbones.load_checkpoint(fused, tensors)
        assert torch.equal(fused(x), logits)


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_heads_of_imagenet_22k(size):
    figures = reference("unireplknet", f"unireplknet_{size}")
    with outlines():
        model = backbones.create_model(f"unireplknet_{size}.in22k")
    own = model.state_dict()
    for name, shape, _ in figures["heads"]["in22k"]:
        assert list(own[name.replace("head.", "head.fc.")].shape) == shape
    recipe = figures["recipe"]["in22k"]
    assert model.pretrained_cfg["input_size"] == (3, recipe["input_size"], recipe["input_size"])


def test_layer_decay_takes_three_blocks_together():
    with outlines():
        model = backbones.create_model("unireplknet_s")
    groups = param_groups_layer_decay(model, weight_decay=1e-8, layer_decay=0.8)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    # As published: the stem, twelve layers of three blocks with the downsampling before, the head.
    layers = {
        "stem.0": 0,
        "stages.0.blocks.2": 1,
        "stages.1.downsample.0": 2,
        "stages.1.blocks.0": 2,
        "stages.2.downsample.1": 3,
        "stages.2.blocks.2": 3,
        "stages.2.blocks.3": 4,
        "stages.2.blocks.26": 11,
        "stages.3.downsample.0": 12,
        "stages.3.blocks.2": 12,
        "head.norm": 13,
        "head.fc": 13,
    }
    for name, layer in layers.items():
        for parameter in model.get_submodule(name).parameters():
            assert scale[id(parameter)] == pytest.approx(0.8 ** (13 - layer)), name


def test_the_video_network_takes_sixteen_frames_in_one_image():
    with outlines():
        model = backbones.create_model("unireplknet_b_k400")
    assert model.default_cfg["input_size"] == (3, 4 * 224, 4 * 224)
