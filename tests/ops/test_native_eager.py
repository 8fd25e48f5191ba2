"""What calls of native kernels are remembered as, and which of them may go past the dispatcher."""

from __future__ import annotations

import torch
from compiled_kernels import using_threads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ops.native.eager import Repeats, is_plain_call


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _repeats() -> tuple[Repeats, list[tuple[object, ...]]]:
    """And what functions were made for."""
    made: list[tuple[object, ...]] = []

    def prepare(x: Tensor, other: Tensor | None, kind: str):
        made.append((x.shape, kind))
        return None if kind == "none" else lambda x, other: len(made)

    return Repeats(prepare), made


def test_a_function_is_made_for_each_kind_of_call_once() -> None:
    repeats, made = _repeats()
    x = torch.zeros(2, 3)
    kinds = (
        ((x, None), "a"),
        ((x, x), "a"),
        ((x, None), "b"),
        ((torch.zeros(3, 2).T, None), "a"),
        ((x.bfloat16(), None), "a"),
        ((torch.zeros(3, 3), None), "a"),
    )
    functions = [repeats.find(tensors, kind) for tensors, kind in kinds]
    assert len(set(functions)) == len(made) == len(kinds)
    assert [repeats.find((t.clone(), o), kind) for (t, o), kind in kinds[:3]] == functions[:3]
    with using_threads(torch.get_num_threads() + 1):
        assert repeats.find((x, None), "a") not in functions
    assert repeats.find((x, None), "none") is repeats.find((x, None), "none") is None
    assert len(made) == len(kinds) + 2


def test_only_so_many_are_remembered(monkeypatch) -> None:
    monkeypatch.setattr(Repeats, "_MOST", 4)
    repeats, made = _repeats()
    for rows in range(1, 12):
        assert repeats.find((torch.zeros(rows), None), "a") is not None
        assert 1 <= len(repeats._functions) <= 4
    assert len(made) == 11


def test_other_than_plain_calls_are_left_to_torch() -> None:
    repeats, made = _repeats()
    x = torch.zeros(2, 3)
    assert is_plain_call((x, None, torch.nn.Parameter(x)))
    assert not is_plain_call((x, x.to("meta")))
    assert not is_plain_call((torch.zeros(2, dtype=torch.complex64).conj(),))
    with _Mode():
        assert not is_plain_call((x,)) and repeats.find((x, None), "a") is None
    with torch.autograd.profiler.profile():
        assert repeats.find((x, None), "a") is None
    assert torch.vmap(lambda row: row * (repeats.find((row, None), "a") is None))(x + 1).all()
    assert not made
