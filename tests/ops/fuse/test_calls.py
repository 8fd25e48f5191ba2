"""Calls are recorded twice, then run rewritten, then replayed, for as long as nothing changes."""

from __future__ import annotations

import cProfile
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compiled_kernels import using_threads
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import backbones
from ops.fuse import calls
from ops.fuse.replayed import Replayed, replayed_class
from ops.inference import layers


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Block(nn.Module):
    """Layers with kernels, torch functions and views."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.act: nn.Module = nn.Identity()
        self.scale = 2.0
        self.runs = itertools.count()  # whose state is seen by none
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        next(self.runs)
        hidden = self.fc1(x) + x
        gates = hidden.mean(1).sigmoid()
        both = torch.cat((hidden, self.act(self.norm(hidden))), 1)[:, 1:]
        return self.fc2(both.mul(gates.unsqueeze(1)).mul(self.scale)).transpose(1, 2)


def _fused(**attributes: object) -> Any:
    block = Block().eval()
    for name, value in attributes.items():
        setattr(block, name, value)
    return layers.convert(block, replayed_class(Block, Replayed))


def _plainly(block: nn.Module, x: Tensor) -> Tensor:
    return Block.forward(block, x)  # type: ignore[arg-type]


def _input(seed: int = 0, rows: int = 5) -> Tensor:
    return torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(seed))


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def _doors(block: Any) -> list[str]:
    return [door.name for door in block.doors]


def _settle(block: Any, x: Tensor) -> None:
    """Call it until it is captured."""
    for _ in range(3):
        assert _is_close(block(x), _plainly(block, x))
    assert _doors(block) == ["recorded"], [*map(str, block.doors)]


def _count(block: Any) -> int:
    """How often forward has run."""
    return block.runs.__reduce__()[1][0]


def test_each_call_does_its_own() -> None:
    """Two are plain to the bit, the third is rewritten, and later ones repeat its bits."""
    block = _fused()
    for seed in (1, 2):
        assert torch.equal(block(_input(seed)), _plainly(block, _input(seed)))
        assert _doors(block) == ["watched"]
    third = block(_input())
    assert _doors(block) == ["recorded"] and _count(block) == 4
    outs = [block(_input(seed)) for seed in range(4)]
    assert _count(block) == 4, "replays run no Python"
    block(_input(9)).zero_()  # which no other result shares its memory with
    assert torch.equal(outs[0], third)
    assert all(_is_close(out, _plainly(block, _input(seed))) for seed, out in enumerate(outs))


_collections: list[str] = []


def _note_collection(phase: str, info: dict[str, int]) -> None:
    _collections.append(phase)


def test_collections_of_garbage_are_no_part_of_a_call() -> None:
    """What they call back may change global variables."""
    before = gc.get_threshold()
    gc.callbacks.append(_note_collection)
    gc.set_threshold(1)
    try:
        _settle(_fused(), _input())
        assert _collections and gc.isenabled()
    finally:
        gc.callbacks.remove(_note_collection)
        gc.set_threshold(*before)


def test_each_kind_of_input_has_a_replay() -> None:
    block = _fused()
    for x in (_input(), _input(rows=6), _input().transpose(0, 1).contiguous().transpose(0, 1)):
        for _ in range(4):
            assert _is_close(block(x), _plainly(block, x))
    with using_threads(torch.get_num_threads() + 1):
        for _ in range(4):
            block(_input())
    assert _doors(block) == ["recorded"] * 4
    part = torch.randn(4, 5, 8)[1:3]  # does not start at its storage's beginning
    assert _is_close(block(part), _plainly(block, part)) and len(_doors(block)) == 4


def test_one_recording_proves_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once two calls of some size have done the same."""
    recorded: list[object] = []
    record = calls.record
    monkeypatch.setattr(
        calls, "record", lambda *args, **kw: (recorded.append(args), record(*args, **kw))[1]
    )
    block = _fused()
    for rows, recordings in ((5, 2), (6, 3), (9, 4)):
        for _ in range(4):
            assert _is_close(block(_input(rows=rows)), _plainly(block, _input(rows=rows)))
        assert len(recorded) == recordings
    assert _doors(block) == ["recorded"] * 3


def test_kinds_of_calls_are_forgotten_by_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are longest past go first."""
    monkeypatch.setattr(calls, "_MOST_BYTES", 1 << 19)
    block = _fused()
    for rows in range(2, 60):
        for _ in range(10):
            block(_input(rows=rows))
    kinds = [*block._calls._kinds.values()]
    assert 0 < sum(kind.nbytes for kind in kinds) < 1 << 20
    assert "2×59×8" in kinds[-1].name and len(kinds) < 50


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, others: list[Tensor], *, scale: float = 1.0) -> Any:
        y = self.fc(x) * scale
        return {"sum": y + others[0], "products": [y * t for t in others]}


def test_arguments_may_be_several_tensors() -> None:
    plain = Several().eval().requires_grad_(False)
    fused = layers.convert(Several(), replayed_class(Several, Replayed))
    fused.load_state_dict(plain.state_dict())
    for seed in range(6):
        x, a, b = (_input(3 * seed + i) for i in range(3))
        expected, found = plain(x, [a, b], scale=0.5), fused(x, [a, b], scale=0.5)
        torch.testing.assert_close(found, expected)
        assert found.keys() == expected.keys() and len(found["products"]) == 2
    assert _doors(fused) == ["recorded"]
    torch.testing.assert_close(fused(x, [a], scale=0.5), plain(x, [a], scale=0.5))
    torch.testing.assert_close(fused(x, [a, x]), plain(x, [a, x]))
    torch.testing.assert_close(fused(x, [a, a[:]]), plain(x, [a, a[:]]))
    assert any("arguments share memory" in door.reason for door in fused.doors)


# -- changes -------------------------------------------------------------------------------------

# tests/ops/fuse/test_law_table.py has the rest.
CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight": lambda block: block.fc1.weight.mul_(2),
    "a module": lambda block: setattr(block, "act", nn.Tanh()),
    "an attribute": lambda block: setattr(block, "scale", 3.0),
    "an attribute inside": lambda block: setattr(block.norm, "eps", 10.0),
    "a forward": lambda block: setattr(block.act, "forward", lambda x: 2 * x),
    "a hook": lambda block: block.norm.register_forward_hook(lambda *args: 2 * args[2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_recorded_again(change: str) -> None:
    block, x = _fused(), _input()
    _settle(block, x)
    before = block(x)
    CHANGES[change](block)
    for _ in range(6):
        out = block(x)
        assert _is_close(out, _plainly(block, x)) and not _is_close(out, before)
    assert _doors(block) == ["recorded"]


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_hooks_of_all_modules_are_detected(kind: str) -> None:
    block, x = _fused(), _input()
    _settle(block, x)
    seen: list[str] = []
    register = getattr(nn.modules.module, f"register_module_forward_{kind}")
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        block(x)
    finally:
        handle.remove()
    assert "LayerNorm" in seen


class Own(Tensor): ...


class Watch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", 0) + (func is torch.cat)
        return func(*args, **(kwargs or {}))


def test_plain_layers_run_where_needed() -> None:
    block, x = _fused(), _input()
    _settle(block, x)
    with Watch() as watch:
        block(x)
    assert watch.seen == 1
    with torch.profiler.profile() as profile:
        block(x)
    assert any(event.key == "aten::cat" for event in profile.key_averages())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    assert type(block(x.as_subclass(Own))) is Own
    torch.testing.assert_close(torch.vmap(block)(x[None])[0], _plainly(block, x))
    with torch.enable_grad():
        image = _input().requires_grad_()
        block(image).sum().backward()
        assert image.grad is not None
        block.requires_grad_(True)
        assert block(x).requires_grad
        block.requires_grad_(False)
        assert not block(x).requires_grad


class Act(nn.Module):
    """Computes a function of itself and the input, and counts its calls."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.calls = function, 0
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(self, x)


@pytest.mark.parametrize(
    "function",
    [lambda act, x: x + act.calls, lambda act, x: x + act.total.add_(1)],
    ids=["counts", "adds to a buffer"],
)
def test_modules_that_change_in_every_call_run_plainly(
    function: Callable[[Any, Tensor], Tensor],
) -> None:
    block, twin = _fused(act=Act(function)), _fused(act=Act(function))
    for seed in range(10):
        x = _input(seed) * (-1) ** seed
        assert torch.equal(block(x), _plainly(twin, x))
    assert block.act.calls == 10
    (door,) = block.doors
    assert door.name == "plain" and door.reason


# -- memory --------------------------------------------------------------------------------------


def test_inputs_are_not_kept_alive() -> None:
    block = _fused()
    for _ in range(6):
        x = _input()
        memory = weakref.ref(x.untyped_storage())
        block(x)
        del x
        gc.collect()
        assert memory() is None
    assert _doors(block) == ["recorded"]


def test_a_model_is_freed_at_once() -> None:
    """With its weights."""
    outer: Any = layers.convert(nn.Sequential(_fused()), replayed_class(nn.Sequential, Replayed))
    for block in (outer, outer[0]):
        for _ in range(5):
            block(_input())
        assert _doors(block) == ["recorded"]
    parts = [weakref.ref(part) for part in (*outer.modules(), *outer.parameters())]
    gc.collect()
    gc.disable()
    try:
        del outer, block
        assert not any(part() is not None for part in parts)
    finally:
        gc.enable()


# -- threads -------------------------------------------------------------------------------------


def test_threads_can_share_a_replay() -> None:
    block = _fused()
    _settle(block, _input(rows=50))
    inputs = [_input(seed, rows=50) for seed in range(4)]
    expected = [block(x) for x in inputs]

    def is_right(x: Tensor, out: Tensor) -> bool:
        with torch.no_grad():
            return all(torch.equal(block(x), out) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, inputs, expected))


# What runs between the first recording and the first replay.
MOMENTS = ("_random_state", "rewrite", "_share_layers", "Capture", "Replay", "_Form")


@pytest.mark.parametrize("moment", MOMENTS)
def test_weights_changed_meanwhile_are_not_lost(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call gives the old or the new answer, not one of both, and later ones the new."""
    block, new, x = _fused(), _fused(), _input()
    old = _plainly(new, x)
    real, changed = getattr(calls, moment), threading.Event()

    def change(module: Any) -> None:
        with torch.no_grad():
            module.fc1.weight.mul_(-3)
            module.fc2.weight.add_(1)

    def meanwhile(*args: Any) -> Any:
        if not changed.is_set():
            changed.set()
            thread = threading.Thread(target=change, args=(block,))
            thread.start()
            thread.join()
        return real(*args)

    monkeypatch.setattr(calls, moment, meanwhile)
    change(new)
    answer = _plainly(new, x)
    assert not _is_close(answer, old)
    for _ in range(12):
        was_changed, out = changed.is_set(), block(x)
        assert _is_close(out, answer) or not was_changed and _is_close(out, old)
    assert changed.is_set() and _doors(block) == ["recorded"]


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["rewrite", "_share_layers", "Capture", "Replay", "_Form"])
def test_what_fails_runs_plainly(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(calls, step, fail)
    block = _fused()
    for seed in range(6):
        out, runs = block(_input(seed)), _count(block)
        assert runs == 2 * seed + 1, "forward runs once"
        assert torch.equal(out, _plainly(block, _input(seed)))
    assert [*map(str, block.doors)] == ["forward(2×5×8): plain (RuntimeError: broken)"]


# -- the trial -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_slower", [True, False])
def test_slower_replays_end(is_slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def lasting(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            now[0] += seconds
            return function(*args)

        return timed

    monkeypatch.setattr(calls, "MEASURES", True)
    monkeypatch.setattr(calls, "clock", lambda: lambda: now[0])
    slow, fast = calls._Form, calls._Call
    monkeypatch.setattr(slow, "__call__", lasting(2.0 if is_slower else 0.5, slow.__call__))
    monkeypatch.setattr(fast, "plainly", lasting(1.0, fast.plainly))
    block, x = _fused(), _input()
    for _ in range(20):
        assert _is_close(block(x), _plainly(block, x))
    (door,) = block.doors
    runs = _count(block)
    block(x)
    assert _count(block) - runs == is_slower
    if is_slower:
        assert (door.name, door.reason) == ("plain", "plain calls are faster than replays")
    else:
        assert door.name == "recorded"


# -- explain() -----------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Of a kind whose calls may take different doors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, is_strict: bool = False) -> Tensor:
        y = self.conv(x).relu()
        return self.fc(y.mean((2, 3))) * (2 if is_strict and y.mean() > 0 else 1)


def test_explain_names_the_door_of_each_call() -> None:
    model = backbones.fuse(Mixed())
    assert backbones.explain(model).doors == []
    for _ in range(5):
        model(torch.randn(1, 3, 8, 8))
        model(torch.randn(2, 3, 8, 8), is_strict=True)
    model(torch.randn(1, 3, 9, 9))
    explained = backbones.explain(model)
    first, second, third = explained.doors
    assert first == "the model, forward(1×3×8×8): recorded"
    assert second.startswith("the model, forward(2×3×8×8): plain (")
    assert third.startswith("the model, forward(1×3×9×9): watched")
    assert all(f"Call of {door}" in str(explained) for door in explained.doors)


def test_profilers_see_plain_calls() -> None:
    """One that isn't a function of Python can't be set again once it was taken away."""
    block = _fused()
    with cProfile.Profile() as profiler:
        for seed in range(4):
            assert torch.equal(block(_input(seed)), _plainly(block, _input(seed)))
    assert len(profiler.getstats()) > 10 and _count(block) == 8
