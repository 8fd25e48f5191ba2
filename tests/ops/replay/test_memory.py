"""Memory that is kept between calls: which call gets it, how much, and for how long."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from fresh_python import run_code

import backbones
from ops.inference import heap
from ops.replay.workspace import Workspace, workspace


@pytest.fixture
def own() -> Workspace:
    return Workspace()


def _address(own: Workspace, nbytes: int) -> int:
    with own.borrow(nbytes) as piece:
        assert piece.nbytes >= nbytes
        return piece.data_ptr()


def test_the_next_call_gets_the_same_memory(own: Workspace) -> None:
    with own.borrow(1000) as first:  # kept, so that no other memory has its address
        pass
    assert [_address(own, n) for n in (1000, 600, 10, 1000)] == [first.data_ptr()] * 4
    # However often more than half of it is needed.
    assert {_address(own, 501) for _ in range(20)} == {first.data_ptr()}
    assert own.nbytes == 1000
    _address(own, 1001)
    assert own.nbytes == 1001


def test_concurrent_calls_have_separate_memory(own: Workspace) -> None:
    with pytest.raises(MemoryError), own.borrow(100):  # a call that fails keeps none
        raise MemoryError
    with own.borrow(100) as one, own.borrow(100) as other:
        assert one.data_ptr() != other.data_ptr() and own.nbytes == 0
    assert own.nbytes == 200


@pytest.mark.parametrize("needed", [1, 499])
def test_oversized_blocks_are_eventually_freed(own: Workspace, needed: int) -> None:
    _address(own, 1000)
    for _ in range(16):
        _address(own, needed)
        assert own.nbytes == 1000
    for _ in range(2):
        _address(own, needed)
    assert own.nbytes == needed


def test_memory_from_inference_mode_is_usable_outside(own: Workspace) -> None:
    with torch.inference_mode():
        _address(own, 8)
    with own.borrow(8) as piece:
        assert not piece.is_inference()
        piece.view(torch.float32).mul_(0.0)


def test_fused_models_keep_memory_until_cleared() -> None:
    backbones.empty_cache()
    model = backbones.create_model("shvit_s1", num_classes=3).eval().fuse()
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        results = [model(x) for _ in range(6)]
    assert workspace.nbytes > 0
    backbones.empty_cache()
    assert workspace.nbytes == 0
    with torch.inference_mode():
        assert all(torch.equal(model(x), result) for result in results[4:])


# ---- the heap ------------------------------------------------------------------------------------
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
    libc = mock.Mock()
    monkeypatch.setattr(heap, "_libc", lambda: libc)
    heap.keep_freed_memory.__wrapped__()
    assert libc.mallopt.called != respected
