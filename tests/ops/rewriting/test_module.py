"""Captured calls are replayed bit-identically for as long as nothing changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compiled_kernels import using_threads
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ops.inference import layers
from ops.replay.replay import Replay
from ops.rewriting.module import Rewritten, rewritten_form


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class _Block(nn.Module):
    """Linear layers that use our kernels, torch functions and views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = (layers.convert(nn.Linear(8, 8), layers.FastLinear) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.act: nn.Module = nn.Identity()
        self.scale = 2.0
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x, x)
        gates = hidden.mean(1).sigmoid()
        both = torch.cat((hidden, self.act(self.norm(hidden))), 1)[:, 1:]
        return self.fc2(both.mul(gates.unsqueeze(1)).mul(self.scale)).transpose(1, 2)


class _Replayed(Rewritten):
    """Calls are captured as they are."""

    def program(self, x: Tensor, call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return call


RecordedBlock = rewritten_form(_Block, _Replayed)


def _recorded(**attributes: object) -> Rewritten:
    block = _Block()
    for name, value in attributes.items():
        setattr(block, name, value)
    return layers.convert(block, RecordedBlock)


def _eagerly(block: nn.Module, x: Tensor) -> Tensor:
    return _Block.forward(block, x)  # type: ignore[arg-type]


def _input(seed: int = 0, rows: int = 5) -> Tensor:
    return torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(seed))


def _programs(block: Rewritten) -> list[Replay]:
    records = block._records
    programs = [] if records is None else list(records._programs.values())
    return [p for p in programs if isinstance(p, Replay)]


def _settle(block: Rewritten, x: Tensor) -> Replay:
    """Call it until it is captured, which happens at the second call."""
    for calls in range(2):
        assert len(_programs(block)) == 0, calls
        assert torch.equal(block(x), _eagerly(block, x))
    (program,) = _programs(block)
    return program


def test_the_third_call_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    block = _recorded()
    _settle(block, _input())
    monkeypatch.setattr(RecordedBlock, "eagerly", lambda *_: pytest.fail("not repeated"))
    outs = [block(_input(seed)) for seed in range(4)]
    block(_input(9)).zero_()  # which no other result shares its memory with
    monkeypatch.undo()
    for seed, out in enumerate(outs):
        expected = _eagerly(block, _input(seed))
        assert torch.equal(out, expected) and out.stride() == expected.stride()


def test_each_kind_of_input_has_a_replay() -> None:
    block = _recorded()
    for x in (_input(), _input(rows=6), _input().transpose(0, 1).contiguous().transpose(0, 1)):
        for _ in range(4):
            assert torch.equal(block(x), _eagerly(block, x))
    with using_threads(torch.get_num_threads() + 1):
        for _ in range(4):
            block(_input())
    assert len(_programs(block)) == 4
    part = torch.randn(4, 5, 8)[1:3]  # does not start at its storage's beginning
    assert torch.equal(block(part), _eagerly(block, part)) and len(_programs(block)) == 4


def test_the_number_of_replays_is_bounded() -> None:
    block = _recorded()
    for rows in range(2, 30):
        for _ in range(3):
            block(_input(rows=rows))
    assert 0 < len(_programs(block)) <= 16


# Those of weights and hooks are tested with networks, in tests/backbones/fusing.
CHANGES: dict[str, Callable[[Any], object]] = {
    "module": lambda block: setattr(block, "act", nn.Tanh()),
    "attribute": lambda block: setattr(block, "scale", 3.0),
    "attribute inside": lambda block: setattr(block.norm, "eps", 10.0),
    "forward": lambda block: setattr(block.act, "forward", lambda x: 2 * x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_detected(change: str) -> None:
    block, x = _recorded(), _input()
    before = _settle(block, x)(x)
    CHANGES[change](block)
    for _ in range(6):
        out = block(x)
        assert torch.equal(out, _eagerly(block, x)) and not torch.equal(out, before)
    assert _programs(block) or change == "forward", "captured again"


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_hooks_of_all_modules_are_detected(kind: str) -> None:
    block, x = _recorded(), _input()
    _settle(block, x)
    seen: list[str] = []
    register = getattr(nn.modules.module, f"register_module_forward_{kind}")
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        block(x)
    finally:
        handle.remove()
    assert "LayerNorm" in seen


class _Own(Tensor): ...


class _Watch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", 0) + (func is torch.cat)
        return func(*args, **(kwargs or {}))


def test_eager_layers_run_where_needed() -> None:
    block, x = _recorded(), _input()
    _settle(block, x)
    with _Watch() as watch:
        block(x)
    assert watch.seen == 1
    with torch.profiler.profile() as profile:
        block(x)
    assert any(event.key == "aten::cat" for event in profile.key_averages())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x)
    assert type(block(x.as_subclass(_Own))) is _Own
    torch.testing.assert_close(torch.vmap(block)(x[None])[0], _eagerly(block, x))
    with torch.enable_grad():
        image = _input().requires_grad_()
        block(image).sum().backward()
        assert image.grad is not None
        block.requires_grad_(True)
        assert block(x).requires_grad
        block.requires_grad_(False)
        assert not block(x).requires_grad
    assert len(_programs(block)) == 1


class _Act(nn.Module):
    """Counts its calls and computes a function of itself and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.calls = function, 0
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(self, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda act, x: x + act.calls,
        lambda act, x: x + act.total.add_(1),
    ],
    ids=["counts", "adds to a buffer"],
)
def test_modules_that_change_in_every_call_are_not_captured(
    function: Callable[[Any, Tensor], Tensor],
) -> None:
    block, twin = _recorded(act=_Act(function)), _recorded(act=_Act(function))
    for seed in range(10):
        x = _input(seed) * (-1) ** seed
        torch.manual_seed(seed)
        out = block(x)
        torch.manual_seed(seed)
        assert torch.equal(out, _eagerly(twin, x))
    assert not _programs(block) and block.act.calls == 10


def test_inputs_are_not_kept_alive() -> None:
    block, x = _recorded(), _input()
    block(x)
    memory = weakref.ref(x.untyped_storage())
    block(x)
    assert len(_programs(block)) == 1
    del x
    gc.collect()
    assert memory() is None


def test_a_model_is_freed_at_once() -> None:
    outer = layers.convert(nn.Sequential(_recorded()), rewritten_form(nn.Sequential, _Replayed))
    for block in (outer, outer[0]):
        for _ in range(3):
            block(_input())
        assert _programs(block)
    parts = [weakref.ref(module) for module in outer.modules()]
    gc.collect()
    gc.disable()
    try:
        del outer, block
        assert not any(part() for part in parts)
    finally:
        gc.enable()


def test_threads_can_share_a_replay() -> None:
    block = _recorded()
    _settle(block, _input(rows=50))
    inputs = [_input(seed, rows=50) for seed in range(4)]
    expected = [_eagerly(block, x) for x in inputs]

    def is_right(x: Tensor, out: Tensor) -> bool:
        with torch.inference_mode():
            return all(torch.equal(block(x), out) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, inputs, expected))
