"""Whatever happens to a module's tensors, hooks and attributes is detected, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ops.replay import changes
from ops.replay.changes import ModuleSnapshot


class _Network(nn.Module):
    _records = None  # as of networks that are rewritten

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm, self.act, self.drop = nn.BatchNorm1d(4), nn.ReLU(), nn.Identity()


def _to_other_place(tensor: Tensor) -> None:
    """Elsewhere in the same memory, as by ``vector_to_parameters``."""
    tensor.data = tensor.data.view(-1)[4:].view(3, 4)


def _swapped(tensor: Tensor) -> None:
    torch.utils.swap_tensors(tensor, nn.Parameter(tensor.detach().clone()))


TENSORS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.zero_(),
    "in place, through a view": lambda t: t[0].detach().add_(1),
    "memory": lambda t: setattr(t, "data", t.data.clone()),
    "part of the memory": _to_other_place,
    "contents of the memory": lambda t: t.untyped_storage().resize_(1 << 20),
    "set": lambda t: t.set_(torch.zeros(4, 4)),
    "swapped": _swapped,
}


@pytest.mark.parametrize("known", [True, False], ids=["in words", "by torch"])
@pytest.mark.parametrize("change", TENSORS)
def test_changes_of_tensors(change: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr(changes, "_LAYOUT", None)
    network = _Network()
    snapshot = ModuleSnapshot(network)
    network.fc(torch.ones(1, 4))  # reads only
    copy = network.fc.weight.detach().clone()  # whose changes are its own
    copy.zero_()
    assert snapshot.is_valid()
    with torch.no_grad():
        TENSORS[change](network.fc.weight)
    assert not snapshot.is_valid()


def test_this_torch_and_python_are_laid_out_as_known() -> None:
    assert changes._LAYOUT is not None, "each call asks torch for each tensor's version"
    assert ModuleSnapshot(_Network())._words is not None, "each call asks Python for each value"


def test_of_tensors_without_versions_only_the_memory_is_known() -> None:
    with torch.inference_mode():
        network = _Network()
    snapshot = ModuleSnapshot(network)
    assert snapshot.is_valid()
    network.fc.weight = nn.Parameter(torch.zeros(4, 4))
    assert not snapshot.is_valid()


MODULES: dict[str, Callable[[_Network], object]] = {
    "attribute": lambda n: setattr(n.norm, "eps", 1.0),
    "attribute of the network": lambda n: setattr(n, "scale", 1.0),
    "mode": lambda n: n.norm.eval(),
    "module": lambda n: setattr(n, "act", nn.GELU()),
    "buffer": lambda n: setattr(n.norm, "running_mean", torch.zeros(4)),
    "parameter": lambda n: n.fc.register_parameter("bias", None),
    "forward": lambda n: setattr(n.drop, "forward", torch.neg),
    "forward hook": lambda n: n.fc.register_forward_hook(lambda *_: None),
    "pre-hook": lambda n: n.drop.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", MODULES)
def test_changes_of_modules(change: str) -> None:
    network = _Network()
    snapshot = ModuleSnapshot(network)
    for _ in range(2):
        assert snapshot.is_valid()
    MODULES[change](network)
    for _ in range(2):
        assert not snapshot.is_valid()


@pytest.mark.parametrize("more", [0, 40])  # so many that Python keeps them in another way
def test_each_attribute(more: int) -> None:
    network = _Network()
    attributes = vars(network.norm)
    attributes |= {f"name_{i}": f"name_{i}" for i in range(more)}
    for name, value in [*attributes.items()]:
        snapshot = ModuleSnapshot(network)
        attributes[name] = [value]
        assert not snapshot.is_valid()
        attributes[name] = value
        assert snapshot.is_valid()


@pytest.mark.parametrize("more", [0, 40])
def test_attributes_that_come_and_go(more: int) -> None:
    network = _Network()
    vars(network.norm).update(dict.fromkeys(map(str, range(more))))
    snapshot = ModuleSnapshot(network)
    for i in range(100):
        setattr(network.norm, f"new_{i}", i)
    for i in range(100):
        assert not snapshot.is_valid()
        delattr(network.norm, f"new_{i}")
    assert snapshot.is_valid()
    network.norm.new_0 = vars(network.norm).pop("eps")
    assert not snapshot.is_valid()


def test_hooks_elsewhere_change_nothing() -> None:
    network, other = _Network(), nn.Linear(2, 2)
    snapshot = ModuleSnapshot(network)
    with other.register_forward_hook(lambda *_: None):
        assert snapshot.is_valid()
        handle = network.act.register_forward_hook(lambda *_: None)
        assert not snapshot.is_valid()
        handle.remove()
    network.register_forward_hook(lambda *_: None)  # called around what is replayed
    assert snapshot.is_valid()
