"""NAT, DiNAT and DiNAT_s beyond the contract: dilations, dense networks, other releases' names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import assert_maps, dense_weights, load_whole
from torch import Tensor, nn
from zoo import images, outlines, randomise, small

import backbones
from backbones.cli.parity import reference, tolerance, variants
from backbones.dinat_s import DiNATS
from backbones.nat import NAT

PYRAMIDS = [(family, variant) for family, variant in variants() if family in ("nat", "dinat_s")]
# By the names that the figures give to the configs that they were taken from.
PRESETS = {
    "ade20k-upernet": "ade20k",
    "coco-cascade-mask-rcnn": "coco",
    "cityscapes-oneformer": "oneformer-cityscapes",
    "coco-oneformer": "oneformer",
    "mask2former": "mask2former",
}
SHALLOW: dict[str, Any] = {
    "dims": (32, 64, 96, 128),
    "num_heads": (1, 2, 3, 4),
    "depths": (2, 1, 1, 1),
    "num_classes": 10,
}


def dilations_of(model: Any) -> list[list[int]]:
    return [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]


# -- dilations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "variant"), PYRAMIDS)
def test_published_dilations(family, variant):
    figures = reference(family, variant)
    with outlines():
        model = backbones.create_model(variant)
    published = figures["config"]["dilations"]
    assert dilations_of(model) == (published or [[1] * d for d in figures["config"]["depths"]])
    for case in figures.get("dense_cases", ()):
        name = PRESETS[case["preset"]]
        if case["dilations"][0][1] == 20 and name == "ade20k":
            name = "ade20k-640"
        with outlines():
            model = backbones.create_model(variant, dilations=name, kernel_size=case["kernel_size"])
        assert dilations_of(model) == case["dilations"]
        assert model.stages[0].blocks[0].attn.kernel_size == (case["kernel_size"],) * 2


def test_dilations_of_stages_and_blocks():
    with outlines():
        assert dilations_of(NAT(dilations=3)) == [[3] * 3, [3] * 4, [3] * 6, [3] * 5]
        model = NAT(depths=(1, 2, 2, 1), dilations=(4, (1, 2), 1, (3,)))
        assert dilations_of(model) == [[4], [1, 2], [1, 1], [3]]
        model = NAT(depths=(2, 1, 7, 1), dilations="ade20k")
        assert dilations_of(model) == [[1, 16], [1], [1, 2, 1, 3, 1, 4, 1], [1]]
        model = NAT((64, 128), (2, 2), (2, 4), dilations="coco")
        assert dilations_of(model) == [[1, 28], [1, 7]]


@pytest.mark.parametrize(
    ("dilations", "error", "said"),
    [
        ("cocoa", ValueError, "dilations must be one of 'imagenet', .*, or numbers, got 'cocoa'"),
        (0, ValueError, "dilations must be in 1 … 1024, got 0"),
        ((1, 2, 1), ValueError, r"dilations must .* the 4 stages of depths \(3, 4, 6, 5\)"),
        ((1, (1, 2), 1, 1), ValueError, r"dilations\[1\] must .* stage's 4 blocks, got \(1, 2\)"),
        ((1, (1, 2, 1, 0), 1, 1), ValueError, r"dilations\[1\]\[3\] must be in 1 … 1024, got 0"),
        (2.5, TypeError, "dilations must be a whole number, got 2.5"),
    ],
    ids=str,
)
def test_refuses_dilations(dilations, error, said):
    with outlines(), pytest.raises(error, match=said):
        NAT(dilations=dilations)


def test_refuses_dilations_of_other_networks():
    with outlines():
        with pytest.raises(ValueError, match="are for 4 stages, got depths"):
            NAT((16,) * 5, (1,) * 5, (1,) * 5, dilations="coco")
        with pytest.raises(ValueError, match="dilations must be one of .*, got 'mask2former'"):
            DiNATS(dilations="mask2former")
        with pytest.raises(ValueError, match="num_heads must divide embed_dim, got 3"):
            NAT(num_heads=(3, 4, 8, 16))
        with pytest.raises(ValueError, match="kernel_size must be odd, got 6"):
            NAT(kernel_size=6)


# -- dense networks --------------------------------------------------------------------------------


def _dense_cases() -> list[Any]:
    cases = []
    for family, variant in PYRAMIDS:
        figures = reference(family, variant)
        for number, case in enumerate(figures.get("dense_cases", ())):
            quick = figures["params"] < 3e7 and case["input"][3] == 202 and "tiny" not in variant
            slow = () if quick else (pytest.mark.slow,)
            cases.append(pytest.param(family, variant, number, marks=slow))
    return cases


@pytest.mark.parametrize(("family", "variant", "number"), _dense_cases())
@torch.no_grad()
def test_dense_networks(family, variant, number):
    """The published dilations on maps that are smaller than windows, most of them."""
    figures = reference(family, variant)
    case = figures["dense_cases"][number]
    model = backbones.create_model(
        variant,
        dilations=[tuple(stage) for stage in case["dilations"]],
        kernel_size=case["kernel_size"],
        out_norms=True,
        num_classes=0,
    ).eval()
    load_whole(model, dense_weights(figures))
    assert_maps(model, case, tolerance(family))
    model.out_norms.clear()
    assert_maps(model, case, tolerance(family), case["stage_outputs"])


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(*both, marks=() if both[1] == "nat_mini" else (pytest.mark.slow,))
        for both in PYRAMIDS
        if reference(*both)["params"] < 1e8
    ],
)
@torch.no_grad()
def test_normalised_maps(family, variant):
    figures = reference(family, variant)
    case = figures["cases"][1]
    model = backbones.create_model(variant, out_norms=True, num_classes=0).eval()
    load_whole(model, dense_weights(figures))
    assert_maps(model, case, tolerance(family))


@pytest.mark.parametrize("family", ["nat", "dinat_s"])
def test_classifiers_become_dense_networks(family):
    model = small(family, out_norms=True, num_classes=0)
    classifier = small(family)
    report = backbones.load_checkpoint(model, classifier.state_dict())
    assert not (report.missing or report.unexpected)
    assert {name.split(".")[0] for name in report.reinitialised} == {"out_norms"}
    assert {name.split(".")[0] for name in report.ignored} == {"norm", "head"}


# -- position biases -------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bias_for_another_kernel():
    """Bicubic, as the authors made their 11×11 weights: what rises goes on to rise."""
    model, larger = small("nat"), small("nat", kernel_size=11)
    rows = torch.linspace(-1, 1, 13).view(1, 13, 1)
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.rpb.copy_(rows.expand(-1, -1, 13))
    report = backbones.load_checkpoint(larger, model.state_dict())
    assert len(report.resized) == 6
    table = larger.stages[1].blocks[0].attn.rpb
    assert table.shape == (3, 21, 21)
    torch.testing.assert_close(table, -table.flip(1))
    assert (table[:, 1:] > table[:, :-1]).all()
    torch.testing.assert_close(table[:, :, 1:], table[:, :, :-1])
    given = model.stages[1].blocks[0].attn.rpb[None]
    expected = F.interpolate(given, (21, 21), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(table, expected)


def test_a_bias_of_other_heads_is_refused():
    with pytest.raises(backbones.CheckpointError, match="another variant"):
        backbones.load_checkpoint(
            DiNATS(**SHALLOW), DiNATS(**SHALLOW | {"num_heads": (2, 2, 3, 4)}).state_dict()
        )


# -- Hugging Face ----------------------------------------------------------------------------------


_TO_HUGGING_FACE = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^levels\.(\d)\.blocks\.", r"encoder.levels.\1.layers."),
    (r"^levels\.", "encoder.levels."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)


def hugging_face(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The original's tensors as transformers 4 had them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("head."):
            found["classifier." + name.removeprefix("head.")] = tensor
            continue
        if match := re.match(r"norm(\d)\.(.*)", name):
            found[f"{prefix}hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}"] = tensor
            continue
        for pattern, theirs in _TO_HUGGING_FACE:
            name = re.sub(pattern, theirs, name)
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[prefix + name.replace("qkv", part)] = third
        elif match := re.search(r"\.gamma([12])$", name):
            key = prefix + name[: match.start()] + ".layer_scale_parameters"
            both = found.setdefault(key, torch.zeros(2, len(tensor)))
            both[int(match[1]) - 1] = tensor
        else:
            found[prefix + name] = tensor
    return found


def original(model: NAT) -> dict[str, Tensor]:
    """A model's tensors by the original's names."""
    found = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^stages\.(\d)\.blocks", r"levels.\1.blocks", name)
        if match := re.match(r"stages\.(\d)\.downsample\.(.*)", name):
            rest = match[2].replace("conv", "reduction")
            name = f"levels.{int(match[1]) - 1}.downsample.{rest}"
        name = re.sub(r"^stem\.conv([12])\.", lambda m: f"patch_embed.proj.{int(m[1]) - 1}.", name)
        name = name.replace("stem.norm.", "patch_embed.norm.").replace("head.fc.", "head.")
        name = re.sub(r"\.ls([12])\.gamma$", r".gamma\1", name)
        found[re.sub(r"^out_norms\.(\d)", r"norm\1", name)] = tensor
    return found


@pytest.mark.parametrize("prefix", ["nat.", "dinat."])
def test_classifiers_of_hugging_face(prefix):
    model, other = randomise(NAT(**SHALLOW, layer_scale=0.3)), NAT(**SHALLOW, layer_scale=0.1)
    for number, (_, scale) in enumerate(
        x for x in model.named_parameters() if x[0].endswith(".gamma")
    ):
        nn.init.constant_(scale, 0.3 + 0.01 * number)
    report = backbones.load_checkpoint(other, hugging_face(original(model), prefix))
    assert not (report.missing or report.unexpected or report.ignored)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "model.pixel_level_module.encoder."])
def test_backbones_of_hugging_face(prefix):
    """Alone, and inside OneFormer beside its other parts."""
    arguments = {**SHALLOW, "num_classes": 0, "out_norms": True}
    model, other = randomise(NAT(**arguments)), NAT(**arguments)
    tensors = hugging_face(original(model), prefix)
    if prefix:
        tensors["model.pixel_level_module.decoder.adapter_1.0.weight"] = torch.zeros(3)
        tensors["model.transformer_module.queries_embedder.weight"] = torch.zeros(3)
        tensors["criterion.empty_weight"] = torch.zeros(3)
    report = backbones.load_checkpoint(other, tensors)
    assert not (report.missing or report.unexpected or report.reinitialised)
    assert len(report.ignored) == (3 if prefix else 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_incomplete_projections_are_rejected():
    model = NAT(**SHALLOW)
    tensors = hugging_face(original(model), "nat.")
    tensors.pop("nat.encoder.levels.0.layers.0.attention.self.key.weight")
    with pytest.raises(backbones.CheckpointError, match=r"attn\.qkv\.weight.*attn\.query\.weight"):
        backbones.load_checkpoint(model, tensors)


# -- the rest --------------------------------------------------------------------------------------


def test_initial_weights():
    torch.manual_seed(0)
    model = NAT(**SHALLOW, layer_scale=1e-5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2), name
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d):  # as torch makes them
            bound = (module.weight[0].numel()) ** -0.5
            assert bound * 0.9 < module.weight.abs().max() <= bound
    block = model.stages[0].blocks[0]
    assert block.attn.rpb.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(block.ls1.gamma, torch.full((32,), 1e-5))
    assert not any("gamma" in name for name in NAT(**SHALLOW).state_dict())


def test_gradients_through_padding():
    """Of the image and of the bias, in a window larger than the map, against finite differences."""
    torch.manual_seed(0)
    model = NAT((8, 8), (1, 1), (2, 2), kernel_size=3, dilations=4, num_classes=0, in_chans=1)
    model = model.double().eval()
    x = torch.randn(1, 1, 12, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x).sum(), (x,), fast_mode=True)


@torch.no_grad()
def test_layer_scales_are_folded():
    model = randomise(NAT(**SHALLOW, layer_scale=0.3)).eval()
    x = images(2, 3, 40, 72)
    expected = model(x)
    model.fuse()
    assert not any("gamma" in name for name in model.state_dict())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    # Weights of a model without scales are those of another network, not of a fused one.
    with pytest.raises(backbones.CheckpointError, match=r"tensors missing.*gamma"):
        backbones.load_checkpoint(NAT(**SHALLOW, layer_scale=0.3), NAT(**SHALLOW).state_dict())
