"""Patches of an image, and their merging."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging as TimmPatchMerging
from zoo import images

from ops.patch import PatchEmbed, PatchMerging


@torch.no_grad()
def test_merging_is_that_of_swin() -> None:
    ours, theirs = PatchMerging(8, 12), TimmPatchMerging(8, 12)
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 8, 6, 10)
    expected = theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 6), (6, 5), (7, 3), (1, 1)])
def test_merging_completes_odd_sides_with_zeros(size: tuple[int, int]) -> None:
    layer = PatchMerging(8, 12)
    x = images(2, 8, *size)
    padded = F.pad(x, (0, size[1] % 2, 0, size[0] % 2))
    out = layer(x)
    assert out.shape == (2, 12, -(-size[0] // 2), -(-size[1] // 2))
    torch.testing.assert_close(out, layer(padded))


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [4, 16])
def test_patches_are_completed_with_zeros(patch_size: int) -> None:
    layer = PatchEmbed(3, 8, patch_size)
    x = images(1, 3, 33, 47)
    out = layer(x)
    assert out.shape == (1, 8, -(-33 // patch_size), -(-47 // patch_size))
    torch.testing.assert_close(out, layer(F.pad(x, (0, 1, 0, -33 % patch_size))))
    whole = x[:, :, :32, :32]
    torch.testing.assert_close(layer(whole), layer.norm(layer.conv(whole)))


def test_merging_of_dynamic_sizes() -> None:
    torch._dynamo.reset()
    layer = PatchMerging(4, 8).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((4, 6), (5, 8), (7, 9)):
        x = images(1, 4, *size)
        torch.testing.assert_close(compiled(x), layer(x))
