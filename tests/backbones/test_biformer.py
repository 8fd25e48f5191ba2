"""BiFormer: as many regions as there are."""

from __future__ import annotations

import torch
from zoo import images

import backbones

SHALLOW = {"dims": (64, 128, 256, 520), "depths": (1, 1, 1, 1)}


@torch.no_grad()
def test_attention_of_all_tokens_in_every_stage():
    """As many regions as there are is what ``topks=None`` means, but for scale and projections."""
    model = backbones.create_model("biformer_tiny", topks=(None,) * 4, **SHALLOW).eval()
    assert not any(type(m).__name__ == "BiLevelRoutingAttention" for m in model.modules())
    assert model(images(1, 3, 64, 64)).isfinite().all()
    many = backbones.create_model("biformer_tiny", topks=(49, 50, 999, None), **SHALLOW).eval()
    all_of_them = backbones.create_model("biformer_tiny", topks=(49, 49, 49, None), **SHALLOW)
    all_of_them.load_state_dict(many.state_dict())
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(many(x), all_of_them.eval()(x))
