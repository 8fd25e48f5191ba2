"""SHViT beyond the contract: maps that are too large for one pass."""

from __future__ import annotations

import torch
from zoo import images, randomise, small


@torch.no_grad()
def test_maps_that_are_too_large_for_one_pass_are_replayed_too():
    plain = randomise(small("shvit")).eval()
    x = images(1, 3, 272, 288)  # 17×18 tokens
    expected = plain(x)
    model = plain.fuse()
    outs = [model(x) for _ in range(6)]
    assert [door.name for door in model.doors] == ["recorded"]
    assert torch.equal(outs[4], outs[5])
    torch.testing.assert_close(outs[0], expected, rtol=1e-4, atol=1e-5)
