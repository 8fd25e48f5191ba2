"""Whether a CPU is faster in bfloat16: decided by its instruction set, or timed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import backbones
from ops.cpu import bfloat16, instruction_sets, policy

INTEL, AMD = ("GenuineIntel", "6", "207"), ("AuthenticAMD", "25", "17")
FLOAT, HALF = torch.float32, torch.bfloat16


class Timing:
    """Stands in for the timing; counts how often there was one."""

    def __init__(self, gain: float) -> None:
        self.gain, self.count = gain, 0

    def __call__(self) -> float:
        self.count += 1
        return self.gain


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, as in a new process."""
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path))
    for function in (bfloat16._gain, bfloat16._warn):
        function.cache_clear()
    yield
    for function in (bfloat16._gain, bfloat16._warn):
        function.cache_clear()


def _use(monkeypatch: pytest.MonkeyPatch, isa: str, cpu: tuple[str, ...], gain: float) -> Timing:
    machine = "aarch64" if isa.startswith("neon") else "x86_64"
    monkeypatch.setattr(instruction_sets, "machine", lambda: machine)
    monkeypatch.setattr(instruction_sets, "_richest", lambda: isa)
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", "")
    known = ("amx", "avx512bf16", "avx512", "neonbf16")
    monkeypatch.setattr(policy, "_has_bfloat16", lambda: isa in known)
    monkeypatch.setattr(bfloat16, "_cpu", lambda: cpu)
    monkeypatch.setattr(bfloat16, "_has_kernels", lambda: True)
    timing = Timing(gain)
    monkeypatch.setattr(bfloat16, "_measured", timing)
    return timing


@pytest.mark.parametrize(
    ("isa", "cpu", "dtype"),
    [
        ("amx", INTEL, HALF),
        ("avx512bf16", AMD, HALF),
        ("neonbf16", ("",), HALF),
        ("avx512", INTEL, FLOAT),
        ("avx2", AMD, FLOAT),
        ("neon", ("",), FLOAT),
        ("portable", INTEL, FLOAT),
    ],
)
def test_cpus_that_are_known(
    isa: str,
    cpu: tuple[str, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    timing = _use(monkeypatch, isa, cpu, gain=0.5 if dtype == HALF else 2)
    assert bfloat16.faster_dtype() == dtype
    bfloat16.warn_if_slower()
    assert not timing.count and not caplog.records


def test_others_are_timed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timing = _use(monkeypatch, "avx512bf16", INTEL, gain=0.75)
    for _ in range(3):
        assert bfloat16.faster_dtype() == FLOAT
    bfloat16._gain.cache_clear()  # another process
    assert bfloat16.faster_dtype() == FLOAT and timing.count == 1
    (kept,) = (tmp_path / "native").iterdir()
    assert kept.read_text() == "0.750\n" and kept.stat().st_mode & 0o777 == 0o600
    for damaged in ("", "fast", "nan", "-1"):
        kept.write_text(damaged)
        bfloat16._gain.cache_clear()
        timing.gain = 1.5
        assert bfloat16.faster_dtype() == HALF and kept.read_text() == "1.500\n"
    assert timing.count == 5
    _use(monkeypatch, "avx512bf16", (*INTEL, "another"), gain=0.5)
    bfloat16._gain.cache_clear()
    assert bfloat16.faster_dtype() == FLOAT
    assert len([*(tmp_path / "native").iterdir()]) == 2


def test_without_a_folder_it_is_timed_in_each_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timing = _use(monkeypatch, "avx512bf16", INTEL, gain=1.2)
    (tmp_path / "file").touch()
    monkeypatch.setattr(bfloat16.folders, "candidates", lambda: [tmp_path / "file" / "native"])
    for _ in range(2):
        bfloat16._gain.cache_clear()
        assert bfloat16.faster_dtype() == HALF == bfloat16.faster_dtype()
    assert timing.count == 2


def test_explicit_bfloat16_warns_once_where_it_is_slower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _use(monkeypatch, "avx512bf16", INTEL, gain=0.72)
    for _ in range(2):
        backbones.fuse(torch.nn.Linear(2, 2), HALF)
        backbones.fuse(torch.nn.Linear(2, 2))
    (record,) = [r for r in caplog.records if r.name == bfloat16.__name__]
    assert "avx512bf16), bfloat16 runs at 0.72 of the speed of float32" in record.getMessage()
    bfloat16._warn.cache_clear()
    _use(monkeypatch, "avx512bf16", (*INTEL, "another"), gain=1.1)
    bfloat16._gain.cache_clear()
    backbones.fuse(torch.nn.Linear(2, 2), HALF)
    assert [r for r in caplog.records if r.name == bfloat16.__name__] == [record]


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_timing(has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernels:
        monkeypatch.setattr(bfloat16, "_has_kernels", lambda: False)
    monkeypatch.setattr(bfloat16, "_LONGEST_S", 0.0)
    state = torch.random.get_rng_state()
    assert 0.001 < bfloat16._measured() < 100
    assert torch.equal(torch.random.get_rng_state(), state)


def test_this_cpu_has_a_name() -> None:
    assert any(bfloat16._cpu())
