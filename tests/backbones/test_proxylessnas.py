"""ProxylessNAS beyond the contract: published files, the head, fused activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import images, randomise, small

import backbones
from backbones.cli.parity import checkpoint, reference


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
    model.reset_classifier(0, "")
    assert not list(model.head.parameters())
    model.reset_classifier(3, "max")
    assert model(images(1, 3, 64, 64)).shape == (1, 3)
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
