"""SHViT beyond the contract: maps that are too large for one pass."""

from __future__ import annotations

import torch
from zoo import images, randomise, small

from ops.replay.replay import Replay


@torch.no_grad()
def test_maps_that_are_too_large_for_one_pass_are_replayed_too():
    plain = randomise(small("shvit")).eval()
    x = images(1, 3, 272, 288)  # 17×18 tokens
    expected = plain(x)
    model = plain.fuse()
    outs = [model(x) for _ in range(4)]
    assert [type(program) for program in model._records._programs.values()] == [Replay]
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(outs[0], expected, rtol=1e-4, atol=1e-5)
