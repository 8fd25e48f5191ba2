"""Huge pages are requested inside large tensors only."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from ops.cpu.call import huge_pages as memory

MIB = 1 << 20


@pytest.fixture
def asked(monkeypatch):
    """What the system is asked, instead of asking it."""
    calls = []
    monkeypatch.setattr(memory, "_madvise", lambda *call: calls.append(call))
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 14, raising=False)
    return calls


@pytest.mark.parametrize("skipped", [0, 1, 1023])
def test_asks_for_whole_pages_inside_the_tensor(asked, skipped):
    tensor = torch.empty(40 * MIB, dtype=torch.uint8)[skipped:]
    memory.ask_for_huge_pages(tensor)
    ((start, length, advice),) = asked
    end = tensor.data_ptr() + tensor.nbytes
    assert advice == 14
    assert start % mmap.PAGESIZE == 0 and length % mmap.PAGESIZE == 0
    assert 0 <= start - tensor.data_ptr() < mmap.PAGESIZE
    assert 0 <= end - (start + length) < mmap.PAGESIZE


def test_asks_for_large_tensors_only(asked):
    small = torch.empty(MIB - 1)
    large = [torch.empty(MIB), torch.empty(2 * MIB, dtype=torch.bfloat16)]
    memory.ask_for_huge_pages(small, large[0], torch.empty(0), large[1])
    assert [start // mmap.PAGESIZE for start, _, _ in asked] == [
        -(-t.data_ptr() // mmap.PAGESIZE) for t in large
    ]


def test_does_nothing_elsewhere(monkeypatch):
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        assert memory._load_madvise() is None
    monkeypatch.setattr(memory, "_madvise", None)
    memory.ask_for_huge_pages(torch.empty(16 * MIB))


def _advised(address):
    """Whether the mapping around the address may have huge pages; Linux."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(x, 16) for x in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError(f"no mapping around {address:#x}")


def test_the_system_hears_it():
    tensor = torch.empty(48 * MIB, dtype=torch.uint8)
    memory.ask_for_huge_pages(tensor)
    if Path("/sys/kernel/mm/transparent_hugepage").exists() and Path("/proc/self/smaps").exists():
        assert _advised(tensor.data_ptr() + 24 * MIB)
    assert tensor.fill_(3).eq(3).all()
