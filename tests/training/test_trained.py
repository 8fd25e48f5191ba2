"""Networks with trained weights: errors in files are reported in one line."""

import pickle

import pytest
import timm
import torch

import backbones
from backbones.common.errors import RecipeError
from backbones.training.trained import load_trained


@pytest.mark.parametrize("name", ["van_b0", "timm/resnet10t"])
def test_not_a_weights_file(name, tmp_path):
    path = tmp_path / "a.pth"
    for content, said in (
        (b"<html><title>404</title></html>", "a web page"),
        (pickle.dumps({"a": 1}), "a bare pickle"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=rf"^{name}: .*a\.pth is {said}") as raised:
            load_trained(name, str(path), 10)
        assert "\n" not in str(raised.value)
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(
        RecipeError, match=r"a\.pth contains more than .*Linear; it was not executed"
    ):
        load_trained(name, str(path), 10)


def test_published_weights_of_other_classes(monkeypatch):
    network = torch.nn.Linear(2, 2)
    network.pretrained_cfg = {"num_classes": 1000}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: network)
    assert load_trained("resnet10t", None, 1000) is network
    with pytest.raises(RecipeError, match="published weights have 1000 classes, not 10"):
        load_trained("resnet10t", None, 10)


@pytest.mark.parametrize("name", ["van_b0", "resnet10t"])
def test_non_finite_weights(name, tmp_path):
    path = str(tmp_path / "a.pth")
    create = backbones.create_model if name == "van_b0" else timm.create_model
    model = create(name, num_classes=10)
    next(model.parameters()).data[0] = float("nan")
    torch.save(model.state_dict(), path)
    with pytest.raises(RecipeError, match=r"a\.pth has NaN or infinite weights"):
        load_trained(name, path, 10)
