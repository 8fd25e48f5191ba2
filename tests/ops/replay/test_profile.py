"""Traces and profiles: the calls of a network with their layers, with and without replays."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from compiled_kernels import using_threads
from torch import Tensor, nn
from torch.nn import functional as F

from ops.cpu import decisions
from ops.cpu.call import binding
from ops.inference import layers
from ops.replay.clock import clock
from ops.replay.module import recorded_form
from ops.replay.profile import profile
from ops.replay.trace import Trace


class _Inner(nn.Module):
    """Calls another module's methods instead of the module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = (layers.convert(nn.Linear(8, 8), layers.FastLinear) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out, energy = self.fc1.energy(x)
        return F.relu(self.fc2(out)).mul(energy.sigmoid().unsqueeze(1))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = _Inner(), nn.LayerNorm(8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.norm(x.transpose(1, 2).contiguous()))
        buffer = torch.empty_like(x)
        buffer[:] = x
        return (buffer.view(-1, 4, 8) + 1)[:, 1:].add_(2).clone()


for _kind in (_Inner, _Network):
    _kind.__module__ = "ops.tests"  # a package whose layers may be captured

CALLS = [
    ("", "torch", "contiguous"),
    ("norm", "torch", "layer_norm"),
    ("inner.fc1", "ours", "packed_linear_energy"),
    ("inner.fc2", "ours", "packed_linear"),
    ("inner", "torch", "relu"),
    ("inner", "torch", "sigmoid"),
    ("inner", "torch", "mul"),
    ("", "torch", "copy_"),
    ("", "torch", "add"),
    ("", "torch", "add_"),
    ("", "torch", "clone"),
]


def _calls(traced: Any) -> list[tuple[str, str, str]]:
    return [(call.layer, call.library, call.kernel) for call in traced]


@torch.no_grad()
def test_layers_of_calls() -> None:
    network, x = _Network(), torch.randn(2, 8, 4)
    network(x)
    with Trace(x, network) as trace:
        out = network(x)
    assert _calls(trace.traced) == CALLS
    assert torch.equal(out, network(x))
    energy = trace.traced[2]
    assert energy.inputs[0] == (2, 4, 8) and energy.outputs == [(2, 4, 8), (2, 8)]
    assert energy.flops == trace.traced[3].flops == 2 * 2 * 4 * 8 * 8
    assert [asked.rule for asked in trace.traced[3].rules] == ["linear_by_kernel"]
    assert not energy.rules and energy.rule == ""  # there is no alternative kernel


class _Replayed(_Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x.transpose(1, 2).contiguous())).contiguous() + 1


_Replayed.__module__ = "ops.tests"


def test_times_of_replays() -> None:
    network, x = layers.convert(_Replayed(), recorded_form(_Replayed)), torch.randn(2, 8, 4)
    found = profile(network, x, repeats=3)
    assert _calls(found.calls)[1:4] == CALLS[1:4]
    (small,) = [call for call in found.calls if call.kernel == "pointwise"]
    assert (small.layer, small.library, small.lowered_from) == ("inner", "ours", "mul")
    assert small.rule == "a small mul, without torch in replays"
    assert small.instruction_set is not None
    assert found.graph is not None and found.plan is not None
    assert all(call.seconds > 0 for call in found.calls) and found.seconds > 0
    assert network._records is None


@pytest.mark.parametrize("fails", [False, True])
def test_state_is_restored(fails: bool) -> None:
    class Failing(_Network):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("it fails")

    network = Failing() if fails else _Network()
    x = torch.randn(2, 8, 4)
    if fails:
        with pytest.raises(RuntimeError, match="it fails"), Trace(x, network):
            network(x)
    else:
        profile(network, x, repeats=1)
    assert not torch._C._len_torch_function_stack()
    assert binding._thread.observer is None and decisions._thread.observer is None


def test_the_clock_of_one_thread_stands_still_while_it_waits() -> None:
    with using_threads(1):
        now = clock()
        begin = now()
        time.sleep(0.05)
        assert now() - begin < 0.04
    with using_threads(2):
        assert clock() is time.perf_counter
