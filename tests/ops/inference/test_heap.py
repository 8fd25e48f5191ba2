"""The heap keeps the memory of maps until it is asked for it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

import backbones
from ops.inference import heap

MIB = 1 << 20


class Libc:
    """Stands for glibc and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.calls.append((parameter, value))


def _write_maps() -> None:
    """Four maps, alive at once."""
    maps = [torch.empty(24 * MIB, dtype=torch.uint8) for _ in range(4)]
    for each in maps:
        each.zero_()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(heap._libc() is None, reason="only glibc keeps memory when told to")
def test_memory_is_kept_until_the_cache_is_emptied() -> None:
    heap.keep_freed_memory()
    _write_maps()
    before, kept = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt, _resident_bytes()
    _write_maps()
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 100  # of 24,576 pages
    backbones.empty_cache()
    assert _resident_bytes() < kept - 80 * MIB


@pytest.mark.parametrize(
    ("name", "value", "respected"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", True),
        ("MALLOC_MMAP_MAX_", "0", True),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072", True),
        ("GLIBC_TUNABLES", "glibc.rtld.nns=4", False),
    ],
)
def test_the_environments_thresholds_are_respected(
    name: str, value: str, respected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    libc = Libc()
    monkeypatch.setattr(heap, "_libc", lambda: libc)
    heap.keep_freed_memory.__wrapped__()
    assert len(libc.calls) == (0 if respected else 2)
