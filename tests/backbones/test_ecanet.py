"""ECA-Net beyond the contract: published files, other kernel sizes."""

from __future__ import annotations

import pytest
import torch
from zoo import small

import backbones
from backbones.cli.parity import checkpoint, reference


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
