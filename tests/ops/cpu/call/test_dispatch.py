"""Which calls may bypass torch's dispatcher."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ops.cpu.call.dispatch import is_plain_call, kernels_apply


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_only_plain_calls_use_kernels() -> None:
    x = torch.zeros(2, 3)
    assert is_plain_call((x, None, torch.nn.Parameter(x)))
    for others in ((x, x.to("meta")), (torch.zeros(2, dtype=torch.complex64).conj(),)):
        assert not is_plain_call(others) and not kernels_apply(others)
    with forward_ad.dual_level():
        assert not is_plain_call((x,)) and not kernels_apply((x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain_call((x,)) and not kernels_apply((x,))
    # Those that only watch see kernels as operators.
    for watching in (_Mode(), torch.autograd.profiler.profile()):
        with watching:
            assert not is_plain_call((x,)) and kernels_apply((x,))
    assert torch.vmap(lambda row: row * (not is_plain_call((row,))))(x + 1).all()
    assert torch.vmap(lambda row: row * (not kernels_apply((row,))))(x + 1).all()
