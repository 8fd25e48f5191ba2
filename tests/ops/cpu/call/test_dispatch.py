"""Which calls may bypass torch's dispatcher."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ops.cpu.call.dispatch import is_plain_call


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_only_plain_calls_use_kernels() -> None:
    x = torch.zeros(2, 3)
    assert is_plain_call((x, None, torch.nn.Parameter(x)))
    assert not is_plain_call((x, x.to("meta")))
    assert not is_plain_call((torch.zeros(2, dtype=torch.complex64).conj(),))
    with _Mode():
        assert not is_plain_call((x,))
    with torch.autograd.profiler.profile():
        assert not is_plain_call((x,))
    assert torch.vmap(lambda row: row * (not is_plain_call((row,))))(x + 1).all()
