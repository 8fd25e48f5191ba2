"""Networks whose calls are recorded: what calls of several shapes share, and which are not."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ops.inference.conversion import to_channels_last
from ops.inference.layers import convert
from ops.replay.module import recorded_form
from ops.rewriting.module import Rewritten


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.tanh(self.first(x)) * 2)


def _network() -> nn.Module:
    return convert(_Network().eval().requires_grad_(False), recorded_form(_Network, Rewritten))


def test_all_calls_give_the_same_bits() -> None:
    network, x = _network(), torch.randn(2, 5, 16)
    first, *others = (network(x) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_threads_may_record_at_once() -> None:
    """Also layers that have their inference form, which each recording sees as one operator."""
    plain, before = _Network().eval(), sys.getswitchinterval()
    inputs = [torch.randn(2, 3 + i % 4, 16) for i in range(24)]
    expected = [plain(x).detach() for x in inputs]
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            model = nn.Sequential(_Network()).eval()
            to_channels_last(model, always=True)
            network = convert(model, recorded_form(nn.Sequential, Rewritten))
            with ThreadPoolExecutor(4) as pool:
                for out, right in zip(pool.map(network, inputs), expected, strict=True):
                    torch.testing.assert_close(out, right)
    finally:
        sys.setswitchinterval(before)
