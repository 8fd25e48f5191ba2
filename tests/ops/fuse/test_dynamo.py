"""``torch.compile(model, backend="backbones")``, and the door of fused modules through Dynamo."""

from __future__ import annotations

import contextvars
import copy
import functools
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from ops.fuse import calls, dynamo


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 8, 3)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu())


def _input(side: int = 12) -> Tensor:
    return torch.randn(2, 3, side, side)


def _assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Dynamo captures."""
    made: list[Any] = []

    class Noted(dynamo._Graph):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(dynamo, "_Graph", Noted)
    return made


def _doors(graphs: list[Any]) -> list[str]:
    return [door.name for graph in graphs for door in graph._calls.doors()]


# -- torch.compile -------------------------------------------------------------------------------


def test_a_model_is_one_graph_that_is_replayed(graphs: list[Any]) -> None:
    model = Net()
    compiled = torch.compile(model, backend="backbones")
    for _ in range(5):
        x = _input()
        _assert_same(compiled(x), model(x))
    assert len(graphs) == 1 and _doors(graphs) == ["recorded"]


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_sizes(dynamic: bool | None, graphs: list[Any]) -> None:
    """With dynamic=True, too, whose graphs take the numbers of layers as tensors."""
    model = Net()
    compiled = torch.compile(model, backend="backbones", dynamic=dynamic)
    for side in 3 * (12, 15):
        x = _input(side)
        _assert_same(compiled(x), model(x))
    assert len(graphs) == (1 if dynamic else 2)
    assert "recorded" in _doors(graphs)


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda model: model.conv.weight.mul_(-2),
    "data": lambda model: setattr(model.conv.weight, "data", -2 * model.conv.weight),
    "a buffer": lambda model: model.norm.running_mean.add_(1),
    "loaded": lambda model: model.load_state_dict(
        {name: t + 1 for name, t in model.state_dict().items()}
    ),
    "replaced": lambda model: setattr(
        model.conv, "weight", nn.Parameter(-2 * model.conv.weight, requires_grad=False)
    ),
    "a layer": lambda model: setattr(model, "head", nn.Conv2d(8, 8, 3).requires_grad_(False)),
    "an attribute": lambda model: setattr(model.norm, "eps", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    model, x = Net(), _input()
    compiled = torch.compile(model, backend="backbones")
    for _ in range(4):
        before = compiled(x)
    CHANGES[change](model)
    for _ in range(4):
        out = compiled(x)
        _assert_same(out, model(x))
        assert not torch.allclose(out, before, atol=1e-3)


def test_gradients() -> None:
    """From the first call on."""
    model = Net().requires_grad_(True).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="backbones")
    with torch.enable_grad():
        for _ in range(3):
            x = _input()
            for net in (compiled, twin):
                net(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        _assert_same(a.grad, b.grad)
    _assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "max-autotune"}, "has no mode 'max-autotune'"),
        ({"options": {"x": 1}}, "has no options, got 'x'"),
    ],
)
def test_other_options_are_errors(given: dict[str, Any], message: str) -> None:
    compiled = torch.compile(Net(), backend="backbones", **given)
    with pytest.raises(ValueError, match=message):
        compiled(_input())


_CODE = """
import sys
import torch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
assert "backbones" in torch._dynamo.list_backends()
assert not {"ops", "backbones"} & sys.modules.keys()
compiled = torch.compile(model.eval(), backend="backbones")
with torch.inference_mode():
    for _ in range(4):
        x = torch.randn(1, 3, 9, 9)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
print("ops.fuse.dynamo" in sys.modules, "backbones" in sys.modules)
"""


def test_a_process_that_never_imported_us(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _CODE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


# -- the door of fused modules -------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call try this door, and stay."""
    monkeypatch.setattr(calls, "MEASURES", True)
    monkeypatch.setattr(calls, "_WORTH_CAPTURING", 0.0)
    monkeypatch.setattr(calls, "CALLS_TO_REPLAY", 0)
    monkeypatch.setattr(calls._Trial, "verdict", lambda self, _: len(self.ours) >= 2 or None)


class Program(Net):
    """What recording does not prove."""

    def __init__(self, program: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.program, self.count, self.kept = program, 0, []
        self.var: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.program(self, x)


def _branch(m: Any, x: Tensor) -> Any:
    y = Net.forward(m, x)
    return y * 2 if y.mean() > 0 else y - 1


def _count(m: Any, x: Tensor) -> Any:
    m.count += 1
    return Net.forward(m, x) * m.count


def _keep_last(m: Any, x: Tensor) -> Any:
    m.var = Net.forward(m, x)
    return m.var + 1


_maps: contextvars.ContextVar[list[Tensor]] = contextvars.ContextVar("maps")


def _hook(m: Any, x: Tensor) -> Any:
    """As transformers 5 does in the first call."""
    if not m.conv._forward_hooks:
        m.conv.register_forward_hook(lambda _, args, out: m.kept.append(out))
    m.kept.clear()
    return Net.forward(m, x), [*m.kept]


@functools.cache
def _table(size: int) -> Tensor:
    return torch.arange(float(size))


# The door that they end at, where this is known of every version of torch.
PROGRAMS: dict[str, tuple[Callable[[Any, Tensor], Any], str | None]] = {
    "a branch on a value": (_branch, "dynamo"),
    "a counter": (_count, "plain"),
    "an attribute": (_keep_last, None),
    "hooks": (_hook, None),
    "a cached table": (lambda m, x: _branch(m, x) + _table(8), "plain"),
    "NumPy": (lambda m, x: Net.forward(m, x) * float(x.numpy().max()), "plain"),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_recording_does_not_prove(name: str) -> None:
    function, expected = PROGRAMS[name]
    plain, fused = Program(function), backbones.fuse(Program(function))
    for i in range(20):
        x = _input() + (-1) ** i
        if i == 14:
            for model in (plain, fused):
                model.conv.weight.mul_(-1.5)
        _assert_same(fused(x), plain(x))
        assert fused.count == plain.count and len(fused.kept) == len(plain.kept)
        if isinstance(plain.var, Tensor):
            _assert_same(fused.var, plain.var)
    (door,) = fused.doors
    assert door.name in ([expected] if expected else ["recorded", "dynamo", "plain"]), str(door)
    assert door.name == "recorded" or door.reason


@pytest.mark.usefixtures("eager")
def test_class_and_globals_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Dynamo's guards leave out, in part."""
    plain, fused, x = Program(_branch), backbones.fuse(Program(_branch)), _input()
    for _ in range(12):
        fused(x)
    assert [door.name for door in fused.doors] == ["dynamo"]
    for patch in (
        lambda: monkeypatch.setattr(Net, "forward", lambda m, x: m.conv(x)),
        lambda: monkeypatch.setitem(globals(), "_branch", None),
        lambda: monkeypatch.setattr(Program, "forward", lambda m, x: m.conv(x) + 5),
    ):
        patch()
        for _ in range(2):
            _assert_same(fused(x), plain(x))


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layer", ["encoder", "attention"])
def test_fast_paths_of_torch_do_not_take_it(layer: str) -> None:
    """Dynamo would compute masked rows otherwise."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            one = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.layer = nn.TransformerEncoder(one, 2) if layer == "encoder" else one

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.layer(x, src_key_padding_mask=mask)
            return y * 2 if x.mean() > 0 else y

    plain, fused = Masked().eval().requires_grad_(False), backbones.fuse(Masked())
    mask = torch.tensor([[False, False, True], [False, False, False]])
    for _ in range(8):
        x = torch.randn(2, 3, 8)
        _assert_same(fused(x, mask), plain(x, mask))
    (door,) = fused.doors
    assert door.name == "plain" and "masked rows" in door.reason


@pytest.mark.usefixtures("eager")
def test_a_model_is_freed_at_once() -> None:
    """With its weights, though Dynamo may keep graphs; and each model has its own captures."""
    for _ in range(10):  # more than Dynamo keeps of one function
        fused = backbones.fuse(Program(_branch))
        for _ in range(12):
            fused(_input() + 1)
        assert [door.name for door in fused.doors] == ["dynamo"]
        parts = [weakref.ref(part) for part in (fused, fused.conv, fused.conv.weight)]
        gc.collect()
        gc.disable()
        try:
            del fused
            assert not any(part() is not None for part in parts)
        finally:
            gc.enable()


class Outer(nn.Module):
    """A network whose part, too, is not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.conv = Program(_branch), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _branch_of_outer(self, x)


def _branch_of_outer(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.conv(m.part(x))
    return y if x.mean() > 0 else -y


@pytest.mark.usefixtures("eager")
def test_parts_wait_until_the_whole_is_decided() -> None:
    """What Dynamo captures with a network is not captured for its part before."""
    torch.manual_seed(0)
    plain = Outer().eval().requires_grad_(False)
    fused = backbones.fuse(copy.deepcopy(plain))
    for number in range(14):
        x = _input()
        _assert_same(fused(x), plain(x))
        assert [door.name for door in fused.part.doors] in ([], ["watched"]), number
    assert [door.name for door in fused.doors] == ["dynamo"]


@pytest.mark.usefixtures("eager")
def test_nothing_is_left_on_tensors() -> None:
    fused = backbones.fuse(Program(_branch))
    for _ in range(12):
        fused(_input())
    assert not any(vars(t) for t in (*fused.parameters(), *fused.buffers()))


@pytest.mark.usefixtures("eager")
def test_slower_graphs_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls._Trial, "verdict", lambda *_: None)
    fused = backbones.fuse(Program(_branch))
    for _ in range(16):
        fused(_input() + 1)
    (door,) = fused.doors
    assert door.name == "plain" and door.reason.endswith("Dynamo's graphs are not faster")


@pytest.mark.usefixtures("eager")
def test_without_dynamo(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As with a Python that is too new for it: plain, and one line in the log."""

    def refuse() -> None:
        raise RuntimeError("Python 3.99 is not supported")

    monkeypatch.setattr(torch._dynamo.eval_frame, "check_if_dynamo_supported", refuse)
    dynamo.unavailable_reason.cache_clear()
    caplog.set_level(logging.WARNING, logger="ops")
    try:
        for _ in range(2):
            plain, fused = Program(_branch), backbones.fuse(Program(_branch))
            for _ in range(8):
                x = _input()
                _assert_same(fused(x), plain(x))
            assert [door.name for door in fused.doors] == ["plain"]
    finally:
        dynamo.unavailable_reason.cache_clear()
    lines = [r for r in caplog.records if r.name == dynamo.__name__]
    assert [r.getMessage() for r in lines] == [
        "torch's Dynamo is not available, so some calls run plainly: Python 3.99 is not supported"
    ]
