"""Networks whose calls are recorded: what calls of several shapes share, and which are not."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from ops.inference import packed_linear
from ops.inference.conversion import to_channels_last
from ops.inference.layers import convert
from ops.replay.module import recorded_form
from ops.rewriting import module as rewritten
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


def test_calls_of_several_shapes_pack_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Tensor] = []
    pack = packed_linear.pack_weight
    monkeypatch.setattr(packed_linear, "pack_weight", lambda w: packed.append(w) or pack(w))
    network = _network()
    for rows in (3, 5, 3, 7):
        x = torch.randn(2, rows, 16)
        torch.testing.assert_close(network(x), _Network()(x))
    assert len(packed) == 2
    network.last.weight.mul_(3)
    network(torch.randn(2, 3, 16))
    assert len(packed) > 2


def test_all_calls_give_the_same_bits() -> None:
    network, x = _network(), torch.randn(2, 5, 16)
    first, *others = (network(x) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_shapes_that_never_come_twice_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    record = rewritten.record
    monkeypatch.setattr(rewritten, "record", lambda *a: recorded.append(len(a[2])) or record(*a))
    network = _network()
    for rows in range(2, 42):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(network(x), _Network()(x))
    assert recorded == list(range(2, 19))
    for _ in range(2):
        network(torch.randn(41, 16))
    assert recorded[-1] == 41


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
