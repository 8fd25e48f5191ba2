"""Threads share a fused module: each call gives the old or the new answer, in the same bits."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import using_threads
from fresh_python import run_code
from torch import Tensor, nn

import backbones

_READERS = 8


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Let Python's threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def _convolutions() -> tuple[nn.Module, tuple[int, ...]]:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 8 * 8, 8)), (1, 3, 12, 12)


def _one_row() -> tuple[nn.Module, tuple[int, ...]]:
    """A call reads each weight once, so that even plainly it sees one value of an element."""
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), (1, 32)


def _replace(model: Any, which: int) -> None:
    """With the same two parameters in turns, or with new ones."""
    weight = model.kept[which]
    model[0].weight = weight if which else nn.Parameter(weight.clone(), requires_grad=False)


def _write_element(model: Any, which: int) -> None:
    with torch.no_grad():
        model[0].weight[0, 0] = 20.0 * which


CHANGES: dict[str, tuple[Callable[[Any, int], None], Callable[[], Any]]] = {
    "a weight is replaced": (_replace, _convolutions),
    "an element is written": (_write_element, _one_row),
}


@pytest.mark.parametrize(
    "seconds", [1.5, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
@pytest.mark.parametrize("change", CHANGES)
def test_each_answer_is_old_or_new(change: str, seconds: float) -> None:
    """From the first call on, and what a thread has changed, its own next call sees."""
    apply, make = CHANGES[change]
    torch.manual_seed(0)
    plain, shape = make()
    plain.eval().requires_grad_(False)
    plain.kept = [nn.Parameter(plain[0].weight * k, requires_grad=False) for k in (1, -2)]
    inputs = [torch.randn(shape) for _ in range(_READERS + 1)]
    answers = []
    for which in (0, 1):
        apply(plain, which)
        answers.append([plain(x) for x in inputs])
    assert not any(map(_is_close, *answers))

    def read(model: Any, number: int, until: float) -> int:
        calls = 0
        with torch.inference_mode():
            while time.monotonic() < until:
                out, calls = model(inputs[number]), calls + 1
                assert any(_is_close(out, answer[number]) for answer in answers), f"call {calls}"
        return calls

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        model = copy.deepcopy(plain)
        apply(model, 0)
        model = backbones.fuse(model)
        until = time.monotonic() + 0.5
        with ThreadPoolExecutor(_READERS) as pool, torch.inference_mode():
            readers = [pool.submit(read, model, number, until) for number in range(_READERS)]
            which = 0
            while time.monotonic() < until:
                time.sleep(0.002)  # in which others read
                which = 1 - which
                with torch.inference_mode(False):
                    apply(model, which)
                assert _is_close(model(inputs[-1]), answers[which][-1]), "an old answer"
            assert all(reader.result() for reader in readers)
            for x, answer in zip(inputs, answers[which], strict=True):
                assert _is_close(model(x), answer), "an old answer at last"


def _is_close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


# Prints the bits of six calls of freshly fused networks.
_RUN = """
import hashlib
import torch
from torch import nn
import backbones

for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.GELU(),
                        nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(7), nn.Flatten(2), nn.Linear(49, 50), nn.Softmax(-1))
    net, x = backbones.fuse(net), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        for _ in range(6):
            print(threads, hashlib.sha256(net(x).numpy().tobytes()).hexdigest())
"""


def test_the_same_bits_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    """For each number of threads."""
    runs = []
    for _ in range(3):
        with using_threads(1):
            exec(_RUN, {})
        runs.append(capsys.readouterr().out)
    assert runs[0].count("\n") == 18 and runs[1:] == runs[:1] * 2


@pytest.mark.slow
def test_the_same_bits_in_each_process(tmp_path: Path) -> None:
    assert run_code(_RUN, tmp_path) == run_code(_RUN, tmp_path)


def test_threads_get_the_bits_of_a_single_one() -> None:
    torch.manual_seed(0)
    plain, _ = _convolutions()
    model, inputs = backbones.fuse(plain), [torch.randn(1, 3, 12, 12) for _ in range(_READERS)]

    def bits(x: Tensor) -> list[Tensor]:
        with using_threads(1), torch.inference_mode():
            return [model(x) for _ in range(50)]

    for x in inputs:
        bits(x)
    with ThreadPoolExecutor(_READERS) as pool:
        together = [*pool.map(bits, inputs)]
    for x, outs in zip(inputs, together, strict=True):
        (alone, *_) = bits(x)
        assert all(torch.equal(out, alone) for out in outs)
