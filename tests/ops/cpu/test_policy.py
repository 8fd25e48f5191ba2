"""Decisions and numbers of threads: of an emulated plainer CPU, with true reasons."""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import re
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from compiled_kernels import using_threads
from hypothesis import strategies as st

from ops.cpu import instruction_sets, policy
from ops.cpu.depthwise.conv import depthwise_conv2d
from ops.cpu.gemm.linear import packed_linear
from ops.cpu.policy import Decision, observe_decisions
from ops.cpu.threads import MACS, VALUES, threads_for

_PUBLIC = inspect.getmembers(policy, inspect.isfunction)
RULES = {n: f for n, f in _PUBLIC if f.__module__ == policy.__name__ and not n.startswith("_")}
RULES = {n: f for n, f in RULES.items() if n not in ("observe_decisions", "rule")}
SETS = {machine: instruction_sets.levels(machine) for machine in ("x86_64", "aarch64")}
HALF, FLOAT = torch.bfloat16, torch.float32
_ONE, _TWO = (1, 1), (2, 2)
# Powers of two and their neighbours, among which are those that rules compare with.
_COUNTS = [n + more for n in (1 << i for i in range(8, 21)) for more in (-1, 0, 1)]
_TOKENS = (1, 7, 16, 17, 48, 49, *_COUNTS[:12])
# Arguments by their names, on both sides of the limits; others are yes or no.
GIVEN: dict[str, Any] = {
    "dtype": (FLOAT, HALF),
    "library": ("gemm", "depthwise"),
    "activation": ("none", "gelu"),
    "rows": _COUNTS,
    "values": (*_COUNTS[-12:], sys.maxsize),
    **dict.fromkeys(("keys", "tokens", "window_size", "features"), _TOKENS),
    "dim": (63, 64, 191, 192),
    "in_features": (31, 32, 33, 191, 192, 511, 512, 1366),
    "out_features": (64, 192),
    "in_channels": (3, 16, 23, 24, 32),
    "out_channels": (24, 31, 32),
    "channels": (16, 17),
    "groups": (1, 3),
    "kernel_size": ((3, 3), (5, 5), (7, 7), (1, 11)),
    "stride": (_ONE, _TWO, (4, 4), (8, 8)),
    "padding": (_ONE, (0, 0)),
    "dilation": (_ONE, _TWO),
}


def _decisions() -> Iterator[tuple[Any, ...]]:
    """Every rule, with every combination of these arguments, and what it says."""
    for name, rule in RULES.items():
        values = (GIVEN.get(p, (False, True)) for p in inspect.signature(rule).parameters)
        for given in itertools.product(*values):
            yield name, given, rule(*given)


def _use(monkeypatch: pytest.MonkeyPatch, cpu: str, asked_for: str = "") -> None:
    """A CPU whose richest instruction set is ``cpu``, and an environment that asks for another."""
    machine = "aarch64" if cpu in SETS["aarch64"] else "x86_64"
    monkeypatch.setattr(instruction_sets, "machine", lambda: machine)
    monkeypatch.setattr(instruction_sets, "_richest", lambda: cpu)
    # oneDNN takes bfloat16 from AVX-512 on.
    known = ("amx", "avx512bf16", "avx512", "neonbf16")
    monkeypatch.setattr(policy, "_has_bfloat16", lambda: cpu in known)
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", asked_for)


@pytest.mark.parametrize("machine", SETS)
def test_every_decision_is_that_of_the_plainer_cpu(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainer = {}
    for cpu in SETS[machine]:
        _use(monkeypatch, cpu)
        plainer[cpu] = list(_decisions())
    for richer, emulated in itertools.combinations(SETS[machine], 2):
        _use(monkeypatch, richer, emulated)
        assert list(_decisions()) == plainer[emulated], (richer, emulated)
    assert plainer[SETS[machine][0]] != plainer["portable"]


_COMPARISON = re.compile(r"([\d.·²]+) ?(?:channels )?([<>≤≥]) (\d+|∞)")
_HOLDS = {"<": operator.lt, ">": operator.gt, "≤": operator.le, "≥": operator.ge}


def _number(text: str) -> float:
    """Of a product or a square, too."""
    if text == "∞":
        return math.inf
    return float(text[:-1]) ** 2 if text.endswith("²") else math.prod(map(float, text.split("·")))


def test_every_reason_is_true_and_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it compares holds."""
    found: list[Decision] = []
    for isa in SETS["x86_64"]:
        _use(monkeypatch, isa)
        with observe_decisions(found.append):
            list(_decisions())
    compared = 0
    for decision in found:
        said = str(decision)
        assert not re.search(r"[{}]|torch\.", said)
        assert said.startswith(f"{decision.rule}: ") and said.endswith(f" → {decision.outcome}")
        for left, relation, right in _COMPARISON.findall(decision.reason):
            assert _HOLDS[relation](_number(left), _number(right)), said
            compared += 1
    assert compared > 500
    assert {a.rule for a in found} == {
        n for n, rule in RULES.items() if inspect.unwrap(rule) != rule
    }


_MANY = 10**6  # rows, values or tokens, more than any limit


@pytest.mark.parametrize(
    ("cpu", "rule", "given", "answer", "because"),
    [
        ("avx2", policy.linear_by_kernel, (_MANY, 64, 256, FLOAT, "none"), True, "≤ ∞"),
        ("avx2", policy.linear_by_kernel, (9, 64, 256, HALF, "none"), True, "no products of it"),
        ("amx", policy.linear_by_kernel, (_MANY, 64, 256, HALF, "none"), False, "rows"),
        ("amx", policy.linear_by_kernel, (_MANY, 64, 256, HALF, "gelu"), True, "GELU"),
        ("amx", policy.linear_by_kernel, (_MANY, 64, 256, FLOAT, "gelu"), False, "rows"),
        ("amx", policy.linear_by_kernel, (_MANY, 64, 256, FLOAT, "silu", True), True, "times"),
        ("amx", policy.linear_by_kernel, (_MANY, 64, 256, HALF, "silu", True), False, "rows"),
        # The narrower side counts, whichever it is.
        ("amx", policy.linear_by_kernel, (_MANY, 256, 8, HALF, "none"), True, "256 → 8, one ≤"),
        ("amx", policy.linear_by_kernel, (_MANY, 8, 256, HALF, "none"), True, "8 → 256, one ≤"),
        ("portable", policy.depthwise_by_kernel,
         (_MANY, 64, (3, 3), _ONE, _ONE, True, FLOAT), False, "values"),
        ("avx512", policy.depthwise_by_kernel,
         (_MANY, 64, (3, 3), _ONE, _ONE, True, FLOAT), True, "padding 1×1"),
        ("avx512", policy.depthwise_by_kernel,
         (_MANY, 64, (5, 5), _TWO, _ONE, True, FLOAT), False, "values"),
        # bfloat16 by whole vectors of 16.
        ("avx512bf16", policy.depthwise_by_kernel,
         (_MANY, 48, (3, 3), _ONE, _ONE, True, HALF), True, "padding"),
        ("avx512bf16", policy.depthwise_by_kernel,
         (_MANY, 56, (3, 3), _ONE, _ONE, True, HALF), False, "values"),
        ("avx2", policy.winograd_by_kernel, (64, 31, 1, FLOAT), False, "64 → 31 channels, one <"),
        ("avx2", policy.winograd_by_kernel, (32, 32, 1, FLOAT), True, ""),
        ("avx2", policy.winograd_by_kernel, (24, 24, 3, FLOAT), False, "3 groups on a CPU where"),
        ("avx512", policy.winograd_by_kernel, (24, 24, 3, FLOAT), True, "≥"),
        ("avx512", policy.winograd_by_kernel, (64, 64, 1, HALF), False, "too inexact"),
        ("avx512", policy.direct_by_kernel, (24, 24, 3, FLOAT), True, "24 → 24 channels ≥"),
        ("avx512", policy.direct_by_kernel, (64, 23, 3, FLOAT), False, "64 → 23 channels, one <"),
        ("avx512", policy.direct_by_kernel, (64, 64, 1, FLOAT), False, "one group"),
        ("avx512", policy.direct_by_kernel, (64, 64, 3, HALF), False, "in float32"),
        ("avx512bf16", policy.direct_by_kernel, (64, 64, 1, HALF), True, "≥"),
        ("amx", policy.direct_by_kernel, (64, 64, 3, HALF), False, "oneDNN may be faster"),
        ("avx2", policy.direct_by_kernel, (24, 24, 3, FLOAT), False, "oneDNN may be faster"),
        ("avx512", policy.window_attention_by_kernel, (7, FLOAT), True, "7², not in tiles"),
        ("amx", policy.window_attention_by_kernel, (40, HALF), False, "40² >"),
        ("avx512", policy.depthwise_mlp_in_int8, (64, FLOAT), True, "64 channels ≥ 64"),
        ("amx", policy.depthwise_mlp_in_int8, (191, HALF), False, "191 channels < 192"),
        ("portable", policy.single_head_by_kernel, (_MANY,), False, "tokens"),
        ("amx", policy.stem_by_kernel, (False, HALF), False, "tiles"),
        ("avx512bf16", policy.stem_by_kernel, (True, HALF), False, "odd channels"),
    ],
)  # fmt: skip
def test_decisions(
    cpu: str, rule: Any, given: tuple[Any, ...], answer: bool, because: str, monkeypatch
) -> None:
    _use(monkeypatch, cpu)
    found: list[Decision] = []
    with observe_decisions(found.append):
        assert rule(*given) is answer
    (decision,) = found
    assert because in decision.reason and decision.answer is answer
    assert decision.instruction_set == cpu


def test_observers_nest() -> None:
    outer: list[Decision] = []
    inner: list[Decision] = []
    with observe_decisions(outer.append):
        with observe_decisions(inner.append):
            policy.single_head_by_kernel(1)
        policy.single_head_by_kernel(tokens=2)
    policy.single_head_by_kernel(3)
    assert [a.arguments["tokens"] for a in inner] == [1]
    assert [a.arguments["tokens"] for a in outer] == [2]


def test_without_vector_instructions_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for dtypes that torch would not multiply, and the kernels can still be called."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "portable")
    cpu = torch.device("cpu")
    assert "torch is faster" in packed_linear.unavailable(cpu, FLOAT)
    assert packed_linear.unavailable(cpu, FLOAT, even_if_slower=True) is None
    assert depthwise_conv2d.unavailable(cpu, FLOAT) is None
    assert (packed_linear.unavailable(cpu, HALF) is None) is not policy.multiplies(HALF)
    monkeypatch.delenv("VISION_BACKBONES_NATIVE_ISA")
    assert policy.left_to_torch("gemm", FLOAT) is None


@hypothesis.given(
    work=st.one_of(st.integers(0, 1 << 40), st.floats(0, 1e15)),
    of_a_thread=st.sampled_from([MACS, VALUES, 1, 512]),
    threads=st.integers(1, 256),
)
def test_thread_counts(work, of_a_thread, threads: int) -> None:
    with using_threads(threads):
        count = threads_for(work, of_a_thread)
    assert 1 <= count <= threads
    assert count == 1 or work / count >= of_a_thread
    assert count == threads or work / (count + 1) < of_a_thread
