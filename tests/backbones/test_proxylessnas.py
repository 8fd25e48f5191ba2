"""ProxylessNAS beyond the contract: omitted blocks, norms, the head, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import images, outlines, randomise, small

import backbones
from backbones.cli.parity import checkpoint, reference

VARIANTS = backbones.list_models(family="proxylessnas")


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_keep_their_numbers(name):
    """As the published table has them: a zero branch is an identity, and counts."""
    config = reference("proxylessnas", name)["config"]
    with outlines():
        model = backbones.create_model(name)
    stages = [[model.stem[1]], *(list(stage.blocks) for stage in model.stages)]
    there = [[int(not isinstance(block, nn.Identity)) for block in stage] for stage in stages]
    assert there == config["has_branch"]
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {config["bn_eps"]}
    for stage, kernels, widths in zip(stages, config["kernels"], config["widths"], strict=True):
        for block, kernel, width in zip(stage, kernels, widths, strict=True):
            if not isinstance(block, nn.Identity):
                assert block.dwconv.conv.kernel_size == (kernel, kernel)
                assert block.project.conv.out_channels == width


def test_published_files_load_as_they_are():
    """They keep the tensors under ``state_dict``."""
    figures = reference("proxylessnas", "proxyless_gpu")
    model = backbones.create_model("proxyless_gpu")
    weights = checkpoint(figures)
    report = backbones.load_checkpoint(model, {"state_dict": weights, "epoch": 0, "best_acc": 0.0})
    assert not (report.missing or report.unexpected or report.ignored)
    # The first block of stage 5 is the original's number 17, though only 10 are before it.
    name = "mobile_inverted_conv.depth_conv.conv.weight"
    assert torch.equal(model.stages[3].blocks[0].dwconv.conv.weight, weights[f"blocks.17.{name}"])
    weights[f"blocks.99.{name}"] = torch.zeros(1)
    with pytest.raises(backbones.CheckpointError, match=r"unexpected \(blocks\.99\."):
        backbones.load_checkpoint(model, weights)


@torch.no_grad()
def test_without_pooling_the_map_passes():
    model = small("proxylessnas").eval()
    x = images(1, 3, 64, 64)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    assert not list(model.head.parameters())
    model.reset_classifier(3, "max")
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, 1432)
    assert model(x).shape == (1, 3)
    mix = model.head.mix
    model.reset_classifier(4)
    assert model.head.mix is mix


@torch.no_grad()
def test_fused_convolutions_apply_the_activation():
    """Nothing but convolutions remains, and the activation is clipped at 6."""
    model = randomise(small("proxylessnas")).eval()
    x = 8 * images(2, 3, 96, 64)
    clipped = []
    handles = [
        m.register_forward_hook(lambda *call: clipped.append((call[2] == 6).any()))
        for m in model.modules()
        if isinstance(m, nn.ReLU6)
    ]
    expected = model(x)
    assert sum(clipped) >= 2
    for handle in handles:
        handle.remove()
    fused = model.fuse()
    for _ in range(3):  # plain, captured, replayed
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    if torch.backends.mkldnn.is_available():
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        calls = backbones.explain(fused, 64, repeats=1).calls
        assert not {"relu6", "hardtanh", "clamp"} & {call.kernel for call in calls}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_sizes": ((3,), (3,))}, "kernel_sizes must have the shape of dims"),
        ({"expansions": ((1,), (3, 0))}, "an expansion of 1 or more"),
        ({"kernel_sizes": ((3,), (4, 3))}, "odd kernel size .* got 4 and 3"),
        ({"kernel_sizes": ((3,), (0, 3)), "expansions": ((1,), (0, 3))}, "stride 2 from 16 to 32"),
        ({"dims": ((16, 16), (32, 32))}, "one block at stride 2|shape of dims"),
        ({"dims": ((16,), (32, 0))}, r"dims\[1\]\[1\] must be in 1"),
    ],
)
def test_faults(arguments, message):
    shape = {
        "dims": ((16,), (32, 32)),
        "kernel_sizes": ((3,), (3, 3)),
        "expansions": ((1,), (3, 3)),
    }
    with pytest.raises(ValueError, match=message):
        backbones.create_model("proxyless_mobile", **{**shape, **arguments})
