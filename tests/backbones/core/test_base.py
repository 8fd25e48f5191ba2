"""What the base class derives: norms of maps, pruning, layer-wise learning rates."""

from __future__ import annotations

import torch
from timm.models import group_parameters
from zoo import images, outlines, randomise, small


@torch.no_grad()
def test_a_map_with_its_own_norm_is_not_normalised_twice() -> None:
    model = randomise(small("litv2", out_norms=True)).eval()
    x = images(1, 3, 64, 64)
    plain, normed = (
        model.forward_intermediates(x, norm=norm, intermediates_only=True) for norm in (False, True)
    )
    torch.testing.assert_close(normed, plain)


def test_pruning_removes_the_norms_and_the_head_that_nothing_needs() -> None:
    with outlines():
        model = small("litv2", out_norms=True, num_classes=5)
        assert model.prune_intermediate_layers([1, 3], prune_head=False) == [1, 3]
        assert set(model.out_norms) == {"1", "3"} and model.num_classes == 5
        model.prune_intermediate_layers([3])
        assert set(model.out_norms) == {"3"} and model.num_classes == 0


def test_a_downsampling_layer_learns_with_the_block_after_it() -> None:
    with outlines():
        model = small("van")
        groups = group_parameters(model, model.group_matcher(), reverse=True)
    of_block = {groups[n] for n in groups if n.startswith("stages.2.blocks.0.")}
    assert {groups[n] for n in groups if n.startswith("stages.2.downsample.")} == of_block
    assert of_block != {groups[n] for n in groups if n.startswith("stages.2.blocks.1.")}
