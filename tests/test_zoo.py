"""Copies of the small models equal what initialises anew, and share nothing."""

from __future__ import annotations

import pytest
import torch
from zoo import FAMILIES, small


@pytest.mark.parametrize("family", FAMILIES)
def test_copies(family: str) -> None:
    first, anew = small(family), small(family, pretrained_cfg_overlay=None)
    next_numbers = torch.rand(3)
    second = small(family)
    assert torch.equal(torch.rand(3), next_numbers)
    assert repr(second) == repr(anew)
    wanted, of_first = anew.state_dict(), first.state_dict()
    assert list(second.state_dict()) == list(wanted)
    for name, value in second.state_dict().items():
        assert torch.equal(value, wanted[name]) and value.stride() == wanted[name].stride(), name
        assert value.data_ptr() != of_first[name].data_ptr(), name
    for (name, mine), (other, theirs) in zip(
        second.named_parameters(), anew.named_parameters(), strict=True
    ):
        assert (name, mine.requires_grad) == (other, theirs.requires_grad)
