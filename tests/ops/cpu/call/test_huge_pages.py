"""Huge pages are requested inside large tensors only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ops.cpu.call.huge_pages import ask_for_huge_pages

MIB = 1 << 20
SMAPS = Path("/proc/self/smaps")


def _advised(address: int) -> bool:
    """Whether the mapping around the address may have huge pages."""
    inside = False
    for line in SMAPS.read_text(errors="replace").splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(x, 16) for x in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError(f"no mapping around {address:#x}")


@pytest.mark.parametrize("skipped", [0, 1023])
def test_the_system_is_asked_for_those_of_large_tensors(skipped: int) -> None:
    tensor = torch.empty(48 * MIB, dtype=torch.uint8)[skipped:]
    small = torch.empty(4 * MIB - 1, dtype=torch.uint8)
    ask_for_huge_pages(small, tensor, torch.empty(0))
    if os.path.exists("/sys/kernel/mm/transparent_hugepage") and SMAPS.exists():
        end = tensor.data_ptr() + tensor.nbytes
        for address in (tensor.data_ptr() + 8192, end - 8192):
            assert _advised(address)
        assert not _advised(small.data_ptr() + small.nbytes // 2)
    assert tensor.fill_(3).eq(3).all()
