"""Kernels use the threads of torch's OpenMP runtime and load no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import needed
import pytest
from fresh_python import run_code

from ops import cpu
from ops.cpu.build import openmp

_RUNTIME = re.compile(r"/lib(?:gomp|iomp5|omp)\b[^/]*$")
# Neighborhood attention in two threads, after a sum of torch's in two.
_CODE = """
import os, sys, torch
torch.set_num_threads(2)
torch.ones(1 << 22).sum()
def tasks(): return len(os.listdir("/proc/self/task"))
before = tasks()
from ops.cpu.build import openmp
from ops.neighborhood import na2d
x = torch.randn(1, 24, 24, 4, 32)
torch.testing.assert_close(na2d(x, x, x, 7, backend="cpu"), na2d(x, x, x, 7, backend="reference"))
libraries = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
print(before, tasks(), openmp.runtime(), *sorted(libraries), sep="\\n")
"""


def _reported(said: str) -> tuple[int, int, Path, list[str]]:
    before, after, runtime, *mapped = said.splitlines()
    return int(before), int(after), Path(runtime), [m for m in mapped if _RUNTIME.search(m)]


def test_a_process_has_one_runtime_and_one_pool_of_threads(tmp_path: Path) -> None:
    before, after, runtime, mapped = _reported(run_code(_CODE, tmp_path))
    assert mapped == [str(runtime)]
    assert after == before


@pytest.mark.needs("libomp")
@pytest.mark.slow
def test_a_runtime_that_was_preloaded_is_shared_too() -> None:
    """As people who tune torch do; torch's own stays mapped, and does nothing."""
    preloaded = needed.libomp()
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS",)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(preloaded)}
    done = subprocess.run(
        [sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after, runtime, _ = _reported(done.stdout)
    assert runtime.resolve() == preloaded.resolve()
    assert after == before


def test_no_kernel_is_linked_with_a_runtime() -> None:
    path = cpu.status("neighborhood").path
    assert path is not None
    assert not re.search(rb"lib(gomp|iomp5|omp)\.", path.read_bytes())


def test_torch_without_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_FUNCTIONS", ("no_such_function",) * 3)
    monkeypatch.setattr(openmp, "_functions", openmp._functions.__wrapped__)
    assert openmp.runtime() is None
    library = cpu.load("neighborhood")
    openmp.use_torch_threads(library)  # which has those that it was given when it was loaded
