"""NAT, DiNAT and DiNAT_s beyond the contract: dilations, dense networks, other releases' names."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import load_whole
from torch import Tensor
from zoo import outlines, small

import backbones
from backbones.cli.parity import checkpoint, reference, variants
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


def test_published_dilations_of_one_resolution():
    for family, variant in variants():
        if family == "nat_isotropic":
            with outlines():
                found = sum(dilations_of(backbones.create_model(variant)), [])
            assert found == (reference(family, variant)["config"].get("dilations") or [1] * 12)


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


def test_weights_of_other_networks_are_refused():
    """Of another number of heads, and without layer scales, which are no fused ones."""
    with pytest.raises(backbones.CheckpointError, match="another variant"):
        backbones.load_checkpoint(
            DiNATS(**SHALLOW), DiNATS(**SHALLOW | {"num_heads": (2, 2, 3, 4)}).state_dict()
        )
    with pytest.raises(backbones.CheckpointError, match=r"tensors missing.*gamma"):
        backbones.load_checkpoint(NAT(**SHALLOW, layer_scale=0.3), NAT(**SHALLOW).state_dict())


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


def shallow(**arguments: Any) -> Any:
    return backbones.create_model("nat_small", depths=(1, 1, 1, 1), **arguments)


def originals(dense: bool = False) -> dict[str, Tensor]:
    """The published names, of as many blocks."""
    figures = reference("nat", "nat_small")
    rows = figures["state_dict"] + (figures["dense_extra"] if dense else [])
    left_out = r"blocks\.[1-9]" + (r"|^norm\.|^head\." if dense else "")
    return checkpoint(figures, [row for row in rows if not re.search(left_out, row[0])])


def load_both(tensors: dict[str, Tensor], theirs: dict[str, Tensor], **arguments: Any) -> Any:
    """Both files give the same network; returns the report about the second."""
    ours, other = shallow(**arguments), shallow(**arguments)
    load_whole(ours, tensors)
    report = backbones.load_checkpoint(other, theirs)
    assert not (report.missing or report.unexpected or report.reinitialised)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    return report


@pytest.mark.parametrize("prefix", ["nat.", "dinat."])
def test_classifiers_of_hugging_face(prefix):
    tensors = originals()
    assert any(".gamma" in name for name in tensors)
    assert not load_both(tensors, hugging_face(tensors, prefix)).ignored


@pytest.mark.parametrize("prefix", ["", "model.pixel_level_module.encoder."])
def test_backbones_of_hugging_face(prefix):
    """Alone, and inside OneFormer beside its other parts."""
    tensors = originals(dense=True)
    theirs = hugging_face(tensors, prefix)
    if prefix:
        theirs["model.pixel_level_module.decoder.adapter_1.0.weight"] = torch.zeros(3)
        theirs["model.transformer_module.queries_embedder.weight"] = torch.zeros(3)
        theirs["criterion.empty_weight"] = torch.zeros(3)
    report = load_both(tensors, theirs, num_classes=0, out_norms=True)
    assert len(report.ignored) == (3 if prefix else 0)


def test_incomplete_projections_are_rejected():
    tensors = hugging_face(originals(), "nat.")
    tensors.pop("nat.encoder.levels.0.layers.0.attention.self.key.weight")
    with pytest.raises(backbones.CheckpointError, match=r"attn\.qkv\.weight.*attn\.query\.weight"):
        backbones.load_checkpoint(shallow(), tensors)
