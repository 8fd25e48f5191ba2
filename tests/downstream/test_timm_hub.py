"""timm's hub files: what ``save_for_hf`` writes comes back as the same network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from zoo import SMALL

from backbones.core import checkpoint

Page = Callable[[str], dict[str, Any]]


def test_page(run_page):
    model = run_page("timm's hub files")["model"]
    assert type(model).__module__ == "backbones.shvit" and model.num_classes == 2


@pytest.mark.parametrize("safe", [True, False])
def test_folder_comes_back(safe, tmp_path):
    name, arguments = SMALL["unireplknet"]
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=safe)
    if safe:  # then preferred
        torch.save({}, tmp_path / "pytorch_model.bin")
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_hub_weights_are_read_as_weights_only(tmp_path, monkeypatch):
    name, arguments = SMALL["van"]
    model = timm.create_model(name, **arguments)
    asked = {}

    def fetch(model_id: str, **options: Any) -> dict[str, Any]:
        asked.update(options, model_id=model_id)
        return model.state_dict()

    monkeypatch.setattr(checkpoint, "load_state_dict_from_hf", fetch)
    again = timm.create_model(
        name,
        pretrained=True,
        cache_dir=tmp_path,
        pretrained_cfg={"hf_hub_id": "you/van", "num_classes": 1000, "input_size": (3, 224, 224)},
        **arguments,
    )
    assert asked == {"model_id": "you/van", "weights_only": True, "cache_dir": tmp_path}
    assert torch.equal(again.stem.conv.weight, model.stem.conv.weight)
