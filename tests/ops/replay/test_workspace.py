"""Memory kept between calls: which call gets it, how much is kept, and for how long."""

from __future__ import annotations

import threading

import pytest
import torch

import backbones
from ops.replay.workspace import Workspace, workspace


@pytest.fixture
def own() -> Workspace:
    return Workspace()


def _address(own: Workspace, nbytes: int) -> int:
    with own.borrow(nbytes) as piece:
        assert piece.nbytes >= nbytes
        return piece.data_ptr()


def test_the_next_call_gets_the_same_memory(own: Workspace) -> None:
    first = _address(own, 1000)
    assert [_address(own, n) for n in (1000, 600, 10, 1000)] == [first] * 4
    assert own.nbytes == 1000


def test_concurrent_calls_have_separate_memory(own: Workspace) -> None:
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


def test_a_stuck_lock_blocks_nobody(own: Workspace) -> None:
    """This occurs in a process that was forked while another thread held the lock."""
    _address(own, 100)
    with own._lock:
        for target, arguments in ((_address, (own, 100)), (own.clear, ())):
            thread = threading.Thread(target=target, args=arguments, daemon=True)
            thread.start()
            thread.join(timeout=60)
            assert not thread.is_alive()
    assert own.nbytes == 0


def test_a_failed_call_keeps_no_memory(own: Workspace) -> None:
    with pytest.raises(MemoryError), own.borrow(100):
        raise MemoryError
    assert own.nbytes == 0


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
        results = [model(x) for _ in range(4)]
    assert workspace.nbytes > 0
    backbones.empty_cache()
    assert workspace.nbytes == 0
    with torch.inference_mode():
        assert all(torch.equal(model(x), result) for result in results[2:])
