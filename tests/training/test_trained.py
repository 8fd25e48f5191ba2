"""Networks with trained weights: errors in files are reported in one line."""

import pickle

import pytest
import timm
import torch

import backbones
from backbones.common.errors import RecipeError
from backbones.training.trained import load_trained


@pytest.mark.parametrize("name", ["van_b0", "timm/resnet10t"])
def test_unusable_files(name, tmp_path):
    path = tmp_path / "a.pth"
    maker = backbones if name == "van_b0" else timm
    model = maker.create_model(name.removeprefix("timm/"), num_classes=10)
    next(model.parameters()).data[0] = float("nan")
    for content, said in (
        (pickle.dumps({"a": 1}), "is a bare pickle"),
        ({"state_dict": torch.nn.Linear(1, 1)}, "contains more .*Linear; it was not executed"),
        (model.state_dict(), "has NaN or infinite weights"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(RecipeError, match=rf"^{name}: .*a\.pth {said}") as raised:
            load_trained(name, str(path), 10)
        # torch's own message advises to load it without its protection.
        assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)


def test_published_weights_of_other_classes(monkeypatch):
    network = torch.nn.Linear(2, 2)
    network.pretrained_cfg = {"num_classes": 1000}
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: network)
    assert load_trained("resnet10t", None, 1000) is network
    with pytest.raises(RecipeError, match="published weights have 1000 classes, not 10"):
        load_trained("resnet10t", None, 10)
