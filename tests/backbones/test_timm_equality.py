"""Families that timm has too: the same weights give the same logits and maps."""

from __future__ import annotations

import pytest
import timm
import torch
from zoo import images, randomise

import backbones
from backbones.cli.parity import relative_error

# One small variant a family by default; the others run with the slow tests.
NAMES = [
    *(f"efficientvit_m{i}" for i in range(6)),
    *(f"inception_next_{size}" for size in ("atto", "tiny", "small", "base")),
    *(f"shvit_s{i}" for i in range(1, 5)),
]
QUICK = {"efficientvit_m0", "inception_next_atto", "shvit_s1", "shvit_s3"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]
)
@torch.no_grad()
def test_same_as_timm(name):
    torch.manual_seed(0)
    theirs = randomise(timm.create_model(name)).eval()
    ours = backbones.create_model(name).eval()
    backbones.load_checkpoint(ours, theirs.state_dict())
    x = images(2, 3, 224, 224)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    maps = ours.forward_intermediates(x, intermediates_only=True)
    expected = theirs.forward_intermediates(x, intermediates_only=True)
    # timm counts the stem of some families as a feature of its own.
    for ours_map, theirs_map in zip(maps, expected[-len(maps) :], strict=True):
        assert relative_error(ours_map, theirs_map) < 1e-5
