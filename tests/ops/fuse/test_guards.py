"""Whatever happens to what a module refers to is detected, and nothing else is."""

from __future__ import annotations

import contextvars
import ctypes
import functools
import os
import sys
import types
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ops.fuse import guards, layout
from ops.fuse.guards import Guards
from ops.fuse.watchers import Watcher, watcher

pytestmark = pytest.mark.skipif(
    Guards(None).failure is not None, reason="without kernels, nothing is replayed"
)

Pair = namedtuple("Pair", "first second")
VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("VARIABLE", default=1)
WAYS = ["watchers", "words", "comparison"]  # of which the last always works


class Options:
    def __init__(self, **options: Any) -> None:
        vars(self).update(options)


class Other(Options): ...


class Slotted:
    __slots__ = ("scale",)


class Maps(dict):
    name = None


def _closure() -> tuple[Callable[[], float], Callable[[float], None]]:
    scale = 1.0

    def put(value: float) -> None:
        nonlocal scale
        scale = value

    return lambda: scale, put


class Network(nn.Module):
    _calls = None  # as of fused networks

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.act, self.drop = nn.ReLU(), nn.Identity()
        self.hooked = nn.Identity()
        self.handle = self.hooked.register_forward_hook(lambda *_: None)
        self.half = Halved(2)
        self.lists = [1.0, [2.0], nn.Linear(2, 2)]
        self.dicts = {"a": {"b": 1.0}, 1: {}}
        self.ordered = OrderedDict(a=1, b=2)
        self.maps = Maps(a=1)
        self.options = Options(scale=1.0, inner=types.SimpleNamespace(scale=1.0))
        self.slotted = Slotted()
        self.slotted.scale = [1.0]
        self.pair = Pair([1.0], torch.ones(2))
        self.table, self.array = torch.ones(2), np.ones(3)
        self.set, self.deque = {1}, deque([1])
        self.variable = VARIABLE
        self.get, self.put = _closure()
        self.bound = functools.partial(max, [1.0])
        self.method = self.options.__init__

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.fc(x)))


class Halved(int):
    """A number with an attribute."""


def _network() -> Any:
    """A network of a class of its own, which has a base of its own."""
    base = type("Base", (Network,), {"inherited": 1.0})
    return type("Own", (base,), {"scale_of_class": [1.0], "fixed": 1.0})().eval()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How changes are detected."""
    chosen = WAYS[WAYS.index(request.param) :]
    if request.param == "watchers" and sys.version_info < (3, 12):
        pytest.skip("Python has no watchers")
    if "watchers" not in chosen:
        monkeypatch.setattr(Watcher, "watch", lambda *_, **__: False)
    if "words" not in chosen:
        for name in (name for name in layout.__all__ if name.startswith("words_of")):
            monkeypatch.setattr(layout, name, lambda *_: None)
    return request.param


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _to_other_place(tensor: Tensor) -> None:
    """Elsewhere in the same memory, as by ``vector_to_parameters``."""
    tensor.data = tensor.data.view(-1)[4:].view(3, 4)


def _swap(tensor: Tensor) -> None:
    torch.utils.swap_tensors(tensor, nn.Parameter(tensor.detach().clone()))


TENSORS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.zero_(),
    "in place, through a view": lambda t: t[0].detach().add_(1),
    "memory": lambda t: setattr(t, "data", t.data.clone()),
    "part of the memory": _to_other_place,
    "contents of the memory": lambda t: t.untyped_storage().resize_(1 << 20),
    "set": lambda t: t.set_(torch.zeros(4, 4)),
    "swapped": _swap,
    "attribute": lambda t: setattr(t, "scale", 1.0),
}


@pytest.mark.parametrize("change", TENSORS)
def test_changes_of_tensors(change: str, way: str) -> None:
    network = _network()
    found = Guards(network)
    network(torch.ones(1, 4))  # reads only
    copy = network.fc.weight.detach().clone()  # whose changes are its own
    copy.zero_()
    assert found.hold()
    TENSORS[change](network.fc.weight)
    assert not found.hold()


def test_of_tensors_without_versions_only_the_memory_is_known(way: str) -> None:
    with torch.inference_mode():
        network = _network()
    found = Guards(network)
    assert found.hold()
    network.fc.weight = nn.Parameter(torch.zeros(4, 4))
    assert not found.hold()


def _replace_hook(n: Any) -> None:
    n.handle.remove()
    n.hooked.register_forward_hook(lambda *_: 1)


CHANGES: dict[str, Callable[[Any], object]] = {
    # Modules.
    "attribute": lambda n: setattr(n.norm, "eps", 1.0),
    "attribute of the network": lambda n: setattr(n, "scale", 1.0),
    "attribute, not by setattr": lambda n: vars(n.norm).update(eps=1.0),
    "equal attribute of another type": lambda n: setattr(n.act, "inplace", 0),
    "attribute deleted": lambda n: delattr(n.norm, "eps"),
    "all attributes deleted": lambda n: vars(n.drop).clear(),
    "mode": lambda n: n.norm.train(),
    "module": lambda n: setattr(n, "act", nn.GELU()),
    "module added": lambda n: n.fc.add_module("more", nn.Identity()),
    "order of modules": lambda n: n._modules.update(fc=n._modules.pop("fc")),
    "buffer": lambda n: setattr(n.norm, "running_mean", torch.zeros(4)),
    "buffer added": lambda n: n.drop.register_buffer("more", None),
    "parameter": lambda n: n.fc.register_parameter("bias", None),
    "state": lambda n: n.load_state_dict({k: v + 1 for k, v in n.state_dict().items()}),
    "forward": lambda n: setattr(n.drop, "forward", torch.neg),
    "class of a module": lambda n: setattr(n.drop, "__class__", nn.Flatten),
    "dictionary of a module": lambda n: setattr(n.drop, "__dict__", {**vars(n.drop), "x": 1}),
    "dictionary of the network": lambda n: setattr(n, "__dict__", {**vars(n), "x": 1}),
    # Hooks.
    "forward hook": lambda n: n.fc.register_forward_hook(lambda *_: None),
    "pre-hook": lambda n: n.drop.register_forward_pre_hook(lambda *_: None),
    "hook removed": lambda n: n.handle.remove(),
    "hook replaced": _replace_hook,
    # What attributes hold.
    "list": lambda n: n.lists.append(1),
    "item of a list": lambda n: n.lists.__setitem__(0, 3.0),
    "order of a list": lambda n: n.lists.reverse(),
    "list in a list": lambda n: n.lists[1].clear(),
    "unregistered layer": lambda n: n.lists[2].weight.add_(1),
    "dictionary": lambda n: n.dicts.update(new=1),
    "dictionary in a dictionary": lambda n: n.dicts["a"].update(b=2.0),
    "dictionary without names": lambda n: n.dicts[1].update({2: 3}),
    "order of a dictionary": lambda n: n.dicts.update(a=n.dicts.pop("a")),
    "order of an OrderedDict": lambda n: n.ordered.move_to_end("a"),
    "attribute of a dictionary": lambda n: setattr(n.maps, "name", 1),
    "configuration": lambda n: setattr(n.options, "scale", 2.0),
    "configuration, added to": lambda n: setattr(n.options, "more", 2.0),
    "configuration, inside": lambda n: setattr(n.options.inner, "scale", 2.0),
    "configuration of another class": lambda n: setattr(n.options, "__class__", Other),
    "all of a configuration": lambda n: setattr(n.options, "__dict__", {"scale": 2.0}),
    "slot": lambda n: setattr(n.slotted, "scale", 1.0),
    "contents of a slot": lambda n: n.slotted.scale.clear(),
    "list in a tuple": lambda n: n.pair.first.append(1),
    "tensor in a tuple": lambda n: n.pair.second.add_(1),
    "plain tensor": lambda n: n.table.add_(1),
    "array": lambda n: n.array.fill(0),
    "set": lambda n: n.set.add(2),
    "deque": lambda n: n.deque.rotate(1) or n.deque.append(2),
    "arguments of a partial": lambda n: n.bound.args[0].append(2),
    "context variable": lambda n: n.variable.set([2]),
    "variable of a closure": lambda n: n.put(2.0),
    # Classes.
    "class attribute": lambda n: setattr(type(n), "fixed", 2.0),
    "class attribute, added": lambda n: setattr(type(n), "more", 2.0),
    "class attribute, deleted": lambda n: delattr(type(n), "fixed"),
    "class attribute, inside": lambda n: type(n).scale_of_class.append(1),
    "attribute of a base class": lambda n: setattr(type(n).__base__, "inherited", 2.0),
    "method": lambda n: setattr(type(n), "forward", lambda self, x: x),
    "bases": lambda n: setattr(type(n), "__bases__", (Network,)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change: str, way: str) -> None:
    network = _network()
    found = Guards(network)
    assert found.failure is None
    for _ in range(2):
        assert found.hold()
    contextvars.copy_context().run(_check_change, CHANGES[change], network, found)


def _check_change(change: Callable[[Any], object], network: Any, found: Guards) -> None:
    change(network)
    for _ in range(2):
        assert not found.hold()


@pytest.mark.parametrize("change", CHANGES)
def test_changes_before_anything_was_compared(change: str, way: str) -> None:
    network = _network()
    found = Guards(network)
    contextvars.copy_context().run(_check_change, CHANGES[change], network, found)


NOTHING: dict[str, Callable[[Any], object]] = {
    "call": lambda n: n(torch.ones(1, 4)),
    "mode as it was": lambda n: n.eval(),
    "equal number": lambda n: setattr(n.norm, "eps", float(str(n.norm.eps))),
    "attribute that comes and goes": lambda n: setattr(n, "new", 1) or delattr(n, "new"),
    "items that come and go": lambda n: n.lists.append(1) or n.lists.pop(),
    "own attribute": lambda n: setattr(n, "_calls", object()),
    "hook of another module": lambda n: nn.Identity().register_forward_hook(lambda *_: None),
    "other instances": lambda n: _network().fc.weight.add_(1),
    "list that moved": lambda n: n.lists.extend(range(99)) or n.lists.__delitem__(slice(3, None)),
}


@pytest.mark.parametrize("change", NOTHING)
def test_what_changes_nothing(change: str, way: str) -> None:
    network = _network()
    vars(network)["_calls"] = None
    found = Guards(network)
    for _ in range(3):
        assert found.hold()
        NOTHING[change](network)
    assert found.hold()


@pytest.mark.parametrize("more", [0, 40])  # so many that Python keeps them in another way
def test_each_attribute(more: int, way: str) -> None:
    network = _network()
    attributes = vars(network.norm)
    attributes |= {f"name_{i}": f"name_{i}" for i in range(more)}
    found = Guards(network)
    for name, value in [*attributes.items()]:
        if "hook" in name or name == "_non_persistent_buffers_set":
            continue
        attributes[name] = [value]
        assert not found.hold(), name
        attributes[name] = value
        assert found.hold(), name


@pytest.mark.parametrize("more", [0, 40])
def test_attributes_that_come_and_go(more: int, way: str) -> None:
    network = _network()
    vars(network.norm).update(dict.fromkeys(map(str, range(more))))
    found = Guards(network)
    for i in range(50):
        setattr(network.norm, f"new_{i}", i)
    for i in range(50):
        assert not found.hold()
        delattr(network.norm, f"new_{i}")
    assert found.hold()
    network.norm.new_0 = vars(network.norm).pop("eps")
    assert not found.hold()


GLOBALS = """
def forward(): return scale * options["scale"] * settings.scale
unread = 0
"""
STATEMENTS = {
    "scale = 2.0": False,
    "options['scale'] = 2.0": False,
    "settings.scale = 2.0": False,
    "scale = 0; del scale": False,
    "unread = 1; new = 2": True,
    "settings.unread = 1": True,
    "scale = float('1000.5')": True,
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_global_variables(statement: str, way: str) -> None:
    settings = types.ModuleType("settings")
    settings.__file__, settings.scale = "settings.py", 1.0
    scope: dict[str, Any] = {"scale": 1000.5, "options": {"scale": 1.0}, "settings": settings}
    exec(compile(GLOBALS, "network.py", "exec"), scope)
    found = Guards(None)
    found.watch_code({scope["forward"].__code__: scope})
    assert found.hold()
    for _ in range(3):
        exec(statement, scope)
        assert found.hold() == STATEMENTS[statement]


def test_environment(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scope: dict[str, Any] = {"os": os}
    exec(compile("def forward(): return os.environ.get('SCALE')", "network.py", "exec"), scope)
    found = Guards(None)
    found.watch_code({scope["forward"].__code__: scope})
    assert found.hold()
    monkeypatch.setenv("SCALE", "2")
    assert not found.hold()


def test_constants(way: str) -> None:
    constant = torch.ones(2)
    found = Guards(None)
    found.watch([constant])
    assert found.hold() and found.tensors == [constant]
    constant.add_(1)
    assert not found.hold()


def test_hooks_of_all_modules() -> None:
    network = _network()
    found = Guards(network)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not found.hold()
        assert Guards(network).failure == "hooks of all modules are set"


def test_a_network_is_not_kept_alive(way: str) -> None:
    network = _network()
    before = sys.getrefcount(network)
    network._calls = found = Guards(network)
    assert sys.getrefcount(network) == before
    assert not any(kept is vars(network) for kept in found._kept)


def test_changes_are_seen_by_each_and_however_many_there_are(way: str) -> None:
    networks = [_network() for _ in range(40)]
    found = [*map(Guards, networks)]
    others = [*map(Guards, networks)]
    assert all(g.hold() for g in (*found, *others))
    for network in networks[1:]:
        for module in network.modules():  # more in total than are remembered
            module.new = 1
            module._parameters["new"] = module._buffers["new"] = module._modules["new"] = None
    assert [g.hold() for g in found] == [g.hold() for g in others] == [True] + [False] * 39


def test_this_torch_and_python_are_laid_out_as_known() -> None:
    assert layout._LAYOUT is not None, "each call asks torch for each tensor's version"
    assert layout._LISTS_ARE_KNOWN and layout._BASES and layout._CLASS_IS_KNOWN
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    found = Guards(network)
    assert found.hold() and not found._noted.checks, "each call asks Python for each value"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python has no watchers")
def test_dictionaries_that_are_watched_have_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"a": {"b": 1.0}}
    few = Guards(None)
    few.watch([held])
    monkeypatch.setattr(Watcher, "watch", lambda *_, **__: False)
    many = Guards(None)
    many.watch([held])
    assert few.hold() and many.hold()
    assert len(few._noted.words) == 1 < len(many._noted.words)


def test_without_a_watcher_there_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: Any) -> int:
        raise RuntimeError("no more dict watcher IDs available")

    monkeypatch.setattr(ctypes.pythonapi, "PyDict_AddWatcher", taken, raising=False)
    monkeypatch.setattr(guards, "watcher", functools.cache(Watcher))
    assert not guards.watcher().watch({})
    network = _network()
    found = Guards(network)
    assert found.hold()
    network.dicts["a"]["b"] = 2.0
    assert not found.hold()
    assert guards.watcher() is not watcher()
