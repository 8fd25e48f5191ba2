"""The error bounds that simd.h and activation.h state, against float64."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from ops.cpu import instruction_sets
from ops.cpu.build import compiler
from ops.cpu.build.sources import SOURCES

_SOURCE = """
#include "common/activation.h"
#define MAP(name)                                                     \\
  extern "C" void map_##name(const float* x, float* y, long count) {  \\
    for (long i = 0; i < count; i += simd::W)                         \\
      simd::store(y + i, name(simd::load(x + i)));                    \\
  }
using namespace simd;
MAP(exp2)
MAP(log2)
MAP(reciprocal)
namespace activation {
MAP(sigmoid)
MAP(tanh)
}
"""


@pytest.fixture(scope="module", params=instruction_sets.candidates())
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "simd.cpp").write_text(_SOURCE)
    words = [
        *compiler.find_compilers(compiler.command())[0],
        *instruction_sets.flags(request.param),
    ]
    built = folder / "simd.so"
    compiler.run(
        [*words, "-O1", f"-I{SOURCES}", str(folder / "simd.cpp"), "-o", str(built)], folder
    )
    return ctypes.CDLL(str(built))


def _map(library: ctypes.CDLL, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``x`` rounded to float32, in float64, and the function's values."""
    x = x.astype(np.float32)
    y = np.empty_like(x)
    address = ctypes.c_void_p
    getattr(library, f"map_{name}")(address(x.ctypes.data), address(y.ctypes.data), len(x))
    return x.astype(np.float64), y.astype(np.float64)


def _ulp(y: np.ndarray) -> np.ndarray:
    return np.spacing(np.float32(y))


@pytest.mark.parametrize(
    ("name", "ends", "error"),
    [
        ("exp2", (-126, 126), lambda x, y: np.abs(y / np.exp2(x) - 1) / 1e-7),
        ("sigmoid", (-100, 100), lambda x, y: np.abs(y - 1 / (1 + np.exp(-x))) / 1e-7),
        ("tanh", (-100, 100), lambda x, y: np.abs(y - np.tanh(x)) / 1.4e-7),
    ],
)
def test_functions(library: ctypes.CDLL, name: str, ends: tuple[int, int], error) -> None:
    assert error(*_map(library, name, np.linspace(*ends, 1 << 18))).max() < 1


def test_functions_of_powers(library: ctypes.CDLL) -> None:
    x, y = _map(library, "log2", np.exp2(np.linspace(0, 120, 1 << 18)))
    assert (np.abs(y - np.log2(x)) - _ulp(np.log2(x))).max() < 2e-7
    x, y = _map(library, "reciprocal", np.exp2(np.linspace(-119, 119, 1 << 18)))
    assert (np.abs(y - 1 / x) / _ulp(1 / x)).max() <= 2


def test_exp2_outside_its_range(library: ctypes.CDLL) -> None:
    x, y = _map(library, "exp2", np.repeat([-np.inf, -1000, np.nan, 0], 16))
    np.testing.assert_array_equal(y, np.repeat([2.0**-126, 2.0**-126, np.nan, 1], 16))
