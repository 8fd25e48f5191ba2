"""FaViT beyond the contract: stage outputs, dense checkpoints, fused linear layers."""

from __future__ import annotations

import pytest
import torch
from published import assert_maps, load_published
from torch import Tensor, nn
from zoo import images

import backbones
from backbones.cli.parity import checkpoint, reference, summary_error, tolerance


@torch.no_grad()
def test_features_are_normalised_stage_outputs():
    model, figures = load_published("favit", "favit_b0")
    raw: list[Tensor] = []
    for stage in model.stages:
        stage.blocks[-1].register_forward_hook(lambda _module, _inputs, out: raw.append(out))
    case = figures["cases"][2]  # sides that divide by nothing
    assert_maps(model, case, tolerance("favit"))
    for value, expected in zip(raw, case["stage_outputs"], strict=True):
        assert summary_error(value.permute(0, 3, 1, 2), expected) <= tolerance("favit")


@torch.no_grad()
def test_dense_checkpoint_loads():
    """The dense code has the same names without the head, wrapped by its trainer."""
    figures = reference("favit", "favit_b0")
    assert not figures["dense_extra"]
    whole = checkpoint(figures)
    dense = {key: t for key, t in whole.items() if key not in figures["dense_missing"]}
    model = backbones.create_model("favit_b0", num_classes=0).eval()
    report = backbones.load_checkpoint(
        model, {"state_dict": {f"backbone.{key}": t for key, t in dense.items()}}
    )
    assert not (report.missing or report.unexpected)
    other = backbones.create_model("favit_b0").eval()
    backbones.load_checkpoint(other, {"model": whole})
    x = images(1, 3, 64, 96)
    assert torch.equal(model.forward_features(x), other.forward_features(x))
    with pytest.raises(backbones.CheckpointError, match="head"):
        backbones.load_checkpoint(other, dense)


@torch.no_grad()
def test_fuse_leaves_nothing_between_linear_layers():
    model = backbones.create_model("favit_b0", depths=(1, 1, 1, 1)).eval()
    assert any(name.endswith(".fc") for name, _ in model.named_modules())
    model.fuse()
    for name, module in model.named_modules():
        if name.endswith("branches.0.fc"):
            assert isinstance(module, nn.Identity)
        if name.endswith(".local_conv"):
            assert isinstance(module, nn.Conv2d)
