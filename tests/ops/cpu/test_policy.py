"""Decisions: those of an emulated plainer CPU, and their reasons."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ops.cpu import instruction_sets, policy
from ops.cpu.build.sources import Sources
from ops.cpu.decisions import Decision, observe_decisions
from ops.cpu.depthwise.conv import depthwise_conv2d
from ops.cpu.gemm.linear import packed_linear

ROOT = Path(__file__).parents[3]
SETS = {machine: instruction_sets.levels(machine) for machine in ("x86_64", "aarch64")}
HALF, FLOAT = torch.bfloat16, torch.float32
# Around the numbers that rules compare with.
_ROWS = (1, 2048, 2049, 4096, 4097, 10**6)
_TOKENS = (1, 7, 16, 17, 48, 49, 256, 257, 1024, 1025)


def _decisions() -> Iterator[tuple[Any, ...]]:
    """Every rule, with arguments on both sides of its limits, and what it says."""
    yield "few_rows", policy.few_rows()
    for dtype in (FLOAT, HALF):
        yield "multiplies", dtype, policy.multiplies(dtype)
        yield "computed_in", dtype, policy.computed_in(dtype)
        yield "by_tiles", dtype, policy.by_tiles(dtype)
        for library in ("gemm", "depthwise"):
            yield "left_to_torch", library, dtype, policy.left_to_torch(library, dtype)
        cases: dict[Any, Any] = {
            policy.linear_in_int8: itertools.product((False, True), (dtype,)),
            policy.pays_in_int8: itertools.product((31, 32, 511, 512), (64,), (dtype,)),
            policy.windows_pay_in_int8: itertools.product((3, 16), (dtype,)),
            policy.response_mlp_in_int8: [(63,), (64,)],
            policy.depthwise_mlp_in_int8: itertools.product((63, 64, 191, 192), (dtype,)),
            policy.linear_by_kernel: itertools.product(
                _ROWS, (32, 33), (64,), (dtype,), ("none", "gelu"), (False, True)
            ),
            policy.packs_linear: itertools.product(
                (191, 192, 1366), (192,), (True, False), ("none", "gelu"), (dtype,)
            ),
            policy.stem_by_kernel: [(True, dtype), (False, dtype)],
            policy.convolves_windows: itertools.product(
                ((1, 1), (2, 2)), ((1, 1), (2, 2)), (1, 4), (dtype,)
            ),
            policy.copies_windows: itertools.product((3, 16), ((4, 4), (8, 8)), (dtype,)),
            policy.conv_by_kernel: itertools.product((3, 16), (True, False), (dtype,)),
            policy.depthwise_by_kernel: itertools.product(
                (1 << 17, (1 << 17) + 1, sys.maxsize),
                (16, 17),
                ((3, 3), (5, 5), (7, 7), (1, 11)),
                ((1, 1), (0, 0)),
                ((1, 1), (2, 2)),
                (True, False),
                (dtype,),
            ),
            policy.softmax_attention_by_kernel: itertools.product(_TOKENS, (dtype,)),
            policy.window_attention_by_kernel: itertools.product(_TOKENS, (dtype,)),
            policy.rotated_attention_by_kernel: itertools.product(_TOKENS, (dtype,)),
            policy.single_head_by_kernel: ((n,) for n in _TOKENS),
            policy.averages_in_linear: ((n,) for n in _TOKENS),
        }
        for rule, arguments in cases.items():
            for given in arguments:
                yield rule.__name__, given, rule(*given)


def _use(monkeypatch: pytest.MonkeyPatch, cpu: str, asked_for: str) -> None:
    """A CPU whose richest instruction set is ``cpu``, and an environment that asks for another."""
    machine = "aarch64" if cpu in SETS["aarch64"] else "x86_64"
    monkeypatch.setattr(instruction_sets, "machine", lambda: machine)
    monkeypatch.setattr(instruction_sets, "_richest", lambda: cpu)
    # oneDNN takes bfloat16 from AVX-512 on.
    known = ("amx", "avx512bf16", "avx512", "neonbf16")
    monkeypatch.setattr(policy, "_has_bfloat16", lambda: cpu in known)
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", asked_for)


@pytest.mark.parametrize(
    ("richer", "emulated"),
    [two for sets in SETS.values() for two in itertools.combinations(sets, 2)],
)
def test_every_decision_is_that_of_the_plainer_cpu(
    richer: str, emulated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, emulated, "")
    plainer = list(_decisions())
    _use(monkeypatch, richer, emulated)
    assert list(_decisions()) == plainer


def test_instruction_sets_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would say nothing."""
    found = []
    for isa in SETS["x86_64"]:
        _use(monkeypatch, isa, "")
        found.append(list(_decisions()))
    alike = [a == b for a, b in itertools.pairwise(found)]
    assert alike == [False, False, True, False]  # AVX-512 and AVX2 are decided alike


def test_bfloat16_without_any_of_our_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU of another family, where oneDNN knows what it multiplies."""
    monkeypatch.setattr(instruction_sets, "_richest", lambda: "portable")
    monkeypatch.setattr(policy, "_has_bfloat16", lambda: True)
    monkeypatch.delenv("VISION_BACKBONES_NATIVE_ISA", raising=False)
    assert policy.multiplies(HALF)


def _decision(rule: Any, *given: Any, **named: Any) -> Decision:
    found: list[Decision] = []
    with observe_decisions(found.append):
        answer = rule(*given, **named)
    assert len(found) == 1 and found[0].answer is answer
    return found[0]


@pytest.mark.parametrize(
    ("cpu", "rule", "given", "said"),
    [
        (
            "avx2",
            policy.linear_by_kernel,
            (3136, 64, 256, FLOAT, "none"),
            "linear_by_kernel: rows 3136 ≤ ∞, float32, avx2 → packed GEMM",
        ),
        (
            "avx2",
            policy.linear_by_kernel,
            (3136, 64, 256, HALF, "none"),
            "linear_by_kernel: torch has no products of it, bfloat16, avx2 → packed GEMM",
        ),
        (
            "amx",
            policy.linear_by_kernel,
            (6272, 64, 256, HALF, "none"),
            "linear_by_kernel: rows 6272 > 4096, bfloat16, amx → oneDNN",
        ),
        (
            "amx",
            policy.linear_by_kernel,
            (6272, 64, 256, FLOAT, "silu", True),
            "linear_by_kernel: times another map, float32, amx → packed GEMM",
        ),
        (
            "amx",
            policy.linear_by_kernel,
            (6272, 64, 32, HALF, "none"),
            "linear_by_kernel: features 64 → 32, one ≤ 32, bfloat16, amx → packed GEMM",
        ),
        (
            "portable",
            policy.depthwise_by_kernel,
            (1 << 20, 64, (3, 3), (1, 1), (1, 1), True, FLOAT),
            "depthwise_by_kernel: window 3×3, values 1048576 > 131072, float32, portable → oneDNN",
        ),
        (
            "avx512",
            policy.depthwise_by_kernel,
            (1 << 20, 64, (5, 5), (2, 2), (1, 1), True, FLOAT),
            "depthwise_by_kernel: window 5×5, values 1048576 > 131072, float32, avx512 → oneDNN",
        ),
        (
            "avx512",
            policy.window_attention_by_kernel,
            (7, FLOAT),
            "window_attention_by_kernel: keys 7², not in tiles, float32, avx512"
            " → windows where they lie",
        ),
        (
            "amx",
            policy.window_attention_by_kernel,
            (17, HALF),
            "window_attention_by_kernel: keys 17² > 256, bfloat16, amx → copies of windows",
        ),
        (
            "portable",
            policy.single_head_by_kernel,
            (257,),
            "single_head_by_kernel: tokens 257 > 256, portable → torch",
        ),
    ],
)
def test_rules_give_reasons(
    cpu: str, rule: Any, given: tuple[Any, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, cpu, "")
    assert str(_decision(rule, *given)) == said


def test_every_reason_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Decision] = []
    for isa in SETS["x86_64"]:
        _use(monkeypatch, isa, "")
        with observe_decisions(found.append):
            list(_decisions())
    assert len(found) > 1000
    assert not [str(asked) for asked in found if re.search(r"[{}]|torch\.", str(asked))]
    named = {a.rule for a in found}
    rules = {name for name in policy.__all__ if hasattr(getattr(policy, name), "__wrapped__")}
    assert named == rules


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


def test_only_policy_checks_the_hardware() -> None:
    """But for ``instruction_sets``, which finds the richest, and ``policy``."""
    asks = re.compile(r"get_cpu_capability|_is_(amx|avx|mkldnn|vnni|arm)|cpuinfo|get_capabilities")
    asking = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("ops/**/*.py")
        if asks.search(path.read_text())
    }
    assert asking == {"ops/cpu/instruction_sets.py", "ops/cpu/policy.py"}


def test_without_vector_instructions_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for dtypes that torch would not multiply, and the kernels can still be called."""
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "portable")
    cpu = torch.device("cpu")
    assert "torch is faster" in packed_linear.unsupported(cpu, FLOAT)
    assert packed_linear.refusal(cpu, FLOAT) is None
    assert depthwise_conv2d.unsupported(cpu, FLOAT) is None
    assert (packed_linear.unsupported(cpu, HALF) is None) is not policy.multiplies(HALF)
    monkeypatch.delenv("VISION_BACKBONES_NATIVE_ISA")
    assert policy.left_to_torch("gemm", FLOAT) is None


def test_the_libraries_of_products_exist() -> None:
    assert set(Sources().all()) >= policy._PRODUCTS
