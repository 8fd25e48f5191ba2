"""The heap keeps the memory of maps until it is asked for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_python import run_code

from ops.inference import heap

# Prints the page faults of rounds that write maps, without and with kept memory, and the MiB that
# are returned in the end. In a process of its own, whose heap has no gaps of other tests.
_ROUNDS = """
import os, resource

for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
    del os.environ[name]

import torch
import backbones
from ops.inference import heap


def faults():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for each in [torch.empty(24 << 20, dtype=torch.uint8) for _ in range(4)]:
        each.zero_()
    del each
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20


plain = [faults() for _ in range(4)]
heap.keep_freed_memory()
kept = [faults() for _ in range(4)]
before = resident()
backbones.empty_cache()
print(min(plain), min(kept), before - resident())
"""


class Libc:
    """Stands for glibc and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.calls.append((parameter, value))


@pytest.mark.skipif(heap._libc() is None, reason="only glibc keeps memory when told to")
def test_memory_is_kept_until_the_cache_is_emptied(tmp_path: Path) -> None:
    plain, kept, returned = map(int, run_code(_ROUNDS, tmp_path).split())
    assert kept < 100 < 1000 < plain
    assert returned > 80  # of 96


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
    for other in ("GLIBC_TUNABLES", *(f"MALLOC_{option}_" for option in heap._OPTIONS)):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    libc = Libc()
    monkeypatch.setattr(heap, "_libc", lambda: libc)
    heap.keep_freed_memory.__wrapped__()
    assert len(libc.calls) == (0 if respected else 2)
