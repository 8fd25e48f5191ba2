"""UniRepLKNet: merged checkpoints, dense form, heads of ImageNet-22k, initial values."""

from __future__ import annotations

import pytest
import torch
from published import assert_maps, dense_weights, load_published, load_whole
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from zoo import images, outlines, randomise

import backbones
from backbones.cli.parity import checkpoint, image, reference, relative_error, tolerance
from ops.frames import frames_to_image

TOLERANCE = tolerance("unireplknet")
SMALL = "unireplknet_a"
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


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_dense_checkpoints(variant):
    figures = reference("unireplknet", variant)
    model = backbones.create_model(variant, num_classes=0, out_norms=True).eval()
    assert sum(p.numel() for p in model.parameters()) == figures["dense"]["params"]
    load_whole(model, {"state_dict": dense_weights(figures)})
    case = figures["cases"][-1]
    assert_maps(model, case, TOLERANCE)
    # The original's merging fails here.
    assert_maps(model.fuse(), case, 10 * TOLERANCE)


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


@pytest.mark.parametrize("size", ["a", "f", "p", "n", "t", "s", "b", "l", "xl"])
def test_published_arguments(size):
    figures = reference("unireplknet", f"unireplknet_{size}")
    recipe = figures["recipe"]
    with outlines():
        model = backbones.create_model(f"unireplknet_{size}")
    blocks = [block for stage in model.stages for block in stage.blocks]
    expected = recipe.get("in1k", recipe.get("in22k_to_in1k"))["drop_path"]
    assert blocks[-1].drop_path.drop_prob == pytest.approx(expected)
    kernels = [getattr(b.dwconv, "kernel_size", (13,))[0] for b in blocks]
    assert kernels == [k for stage in figures["config"]["kernel_sizes"] for k in stage]
    weights = {entry["url"] for entry in figures["weights"]}
    tags = backbones.core.registry.published_weights(f"unireplknet_{size}")
    assert {cfg.url for cfg in tags.values()} == weights


def test_initial_values():
    model = backbones.create_model(SMALL, head_init_scale=0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scale = 0.5 if name == "head.fc" else 1.0
            bound = 4 * 0.02 / module.weight.numel() ** 0.5 + 1e-4
            assert abs(module.weight.std().item() - 0.02 * scale) <= bound, name
            assert module.bias is None or not module.bias.any(), name
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            assert (parameter == 1e-6).all()
        elif ".grn." in name:
            assert not parameter.any()


def test_response_norms_are_decayed():
    model = backbones.create_model(SMALL)
    assert model.no_weight_decay() == set()
    assert all(p.ndim == 4 for n, p in model.named_parameters() if ".grn." in n)


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


@torch.no_grad()
def test_a_pattern_of_kernels_repeats_over_the_blocks():
    model = randomise(
        backbones.create_model(SMALL, depths=(1, 1, 5, 1), kernel_sizes=(5, 7, (9, 3), 11))
    ).eval()
    kernels = [getattr(b.dwconv, "kernel_size", None) for b in model.stages[2].blocks]
    assert kernels == [None, (3, 3), None, (3, 3), None]
    x = images(1, 3, 64, 96)
    expected = model(x)
    assert relative_error(model.fuse()(x), expected) <= 1e-4


@pytest.mark.parametrize("kernel_sizes", [(3, 12, 13, 13), (3, 13, 19, 13), (3, 13, 0, 13)])
def test_bad_kernels_are_refused(kernel_sizes):
    with pytest.raises(ValueError, match="kernel"):
        backbones.create_model(SMALL, kernel_sizes=kernel_sizes)


@pytest.mark.slow
@torch.no_grad()
def test_videos_are_read_as_the_original_reads_them():
    """Its figures are those of 16 frames that its engine made an image of."""
    model, figures = load_published("unireplknet", "unireplknet_b_k400")
    for case in figures["cases"]:
        # Its memory is the video's: the figures' own image, of which the video was made.
        video = image(case["input"], case["seed"]).reshape(case["video"])
        logits = model(frames_to_image(video))
        assert relative_error(logits, case["logits"]) <= TOLERANCE
        tiles = model(frames_to_image(video, "tiles"))
        assert relative_error(tiles, case["logits"]) > 1e-2


def test_the_video_network_is_the_published_one():
    figures = reference("unireplknet", "unireplknet_b_k400")
    with outlines():
        model = backbones.create_model("unireplknet_b_k400")
    kernels = [
        [
            max(p.shape[-1] for p in block.dwconv.parameters() if p.ndim == 4)
            for block in stage.blocks
        ]
        for stage in model.stages
    ]
    assert kernels == figures["config"]["kernel_sizes"]
    height, width = model.default_cfg["input_size"][1:]
    assert (height, width) == (4 * 224, 4 * 224)
