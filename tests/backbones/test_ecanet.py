"""ECA-Net beyond the contract: kernel sizes, published files, gradients, the MobileNetV2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import outlines, small

import backbones
from backbones.cli.parity import checkpoint, reference
from ops.attention.channel import EfficientChannelAttention

SMALL_MOBILE: dict[str, Any] = {"dims": ((16,), (24, 24), (32, 96), (104,)), "num_classes": 10}


def mobile(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return backbones.create_model("eca_mobilenet_v2", **{**SMALL_MOBILE, **kwargs})


@pytest.mark.parametrize("name", backbones.list_models(family="ecanet"))
def test_published_kernel_sizes(name):
    config = reference("ecanet", name)["config"]
    with outlines():
        model = backbones.create_model(name)
    attentions = [m for m in model.modules() if isinstance(m, EfficientChannelAttention)]
    sizes = [attention.conv.weight.shape[2] for attention in attentions]
    if name == "eca_mobilenet_v2":
        assert sizes == config["k_by_block"]
    else:
        depths = zip(config["k_size"], config["layers"], strict=True)
        assert sizes == [size for size, depth in depths for _ in range(depth)]


@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenet_v2"])
def test_files_of_the_training_script(name):
    """Names of a DataParallel model, next to the state of the training."""
    weights = checkpoint(reference("ecanet", name))
    file = {"state_dict": {f"module.{n}": t for n, t in weights.items()}, "epoch": 3, "arch": name}
    report = backbones.load_checkpoint(model := backbones.create_model(name), file)
    assert not (report.missing or report.unexpected or report.ignored)
    again = backbones.load_checkpoint(small("ecanet"), small("ecanet").state_dict())
    assert not (again.missing or again.unexpected)
    if name == "eca_mobilenet_v2":
        first = model.stem[1].eca.conv.weight
        assert torch.equal(first, weights["features.1.conv.3.conv.weight"])
        last = model.stages[-1].blocks[-1].eca.conv.weight
        assert torch.equal(last, weights["features.17.conv.4.conv.weight"])


def test_a_file_with_other_kernel_sizes():
    weights = small("ecanet", attn_kernel_sizes=(3, 3, 7, 7)).state_dict()
    message = r"eca\.conv\.weight has shape \(1, 1, 3\), but the model's is \(1, 1, 5\)"
    with pytest.raises(backbones.CheckpointError, match=message):
        backbones.load_checkpoint(small("ecanet"), weights)
    backbones.load_checkpoint(small("ecanet", attn_kernel_sizes=(3, 3, 7, 7)), weights)


def test_initial_weights():
    """Normal with variance 2 / (k² · out), the depthwise ones too."""
    model = mobile()
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        std = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(std, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_kernel_sizes": (3, 4, 5, 7)}, r"attn_kernel_sizes\[1\] must be odd, got 4"),
        ({"attn_kernel_sizes": (3, 5)}, "attn_kernel_sizes must have a value for each of the 4"),
        ({"dims": (64, 96, 130, 192)}, "dims must be multiples of 4 with bottleneck"),
    ],
)
def test_faults(arguments, message):
    with pytest.raises(ValueError, match=message):
        small("ecanet", **arguments)


@pytest.mark.parametrize("dims", [((16,),), ((16,), ()), ((16,), (0,))])
def test_faults_of_the_mobile_network(dims):
    with pytest.raises(ValueError, match="dims"):
        mobile(dims=dims)
