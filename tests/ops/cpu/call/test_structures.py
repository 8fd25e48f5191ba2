"""Structures as the headers declare them, and as the libraries have them."""

from __future__ import annotations

import ctypes
import re

import pytest

from ops import cpu
from ops.cpu.call.structures import SOURCES, included, parameters, structure

_EXPORTS = [
    (source.stem, *names)
    for source in sorted(SOURCES.glob("*/*.cpp"))
    for names in re.findall(r"^VB_EXPORT_BYTES\((\w+), (\w+)\)", source.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("library", "space", "name"), _EXPORTS)
def test_libraries_have_the_structures_of_their_headers(
    library: str, space: str, name: str
) -> None:
    (source,) = SOURCES.glob(f"*/{library}.cpp")
    kind = structure(str(source.relative_to(SOURCES)), f"{space}::{name}")
    exported = getattr(cpu.load(library), f"{space}_{name}_bytes")
    assert exported() == ctypes.sizeof(kind) > 0


def test_fields_are_read_in_their_order() -> None:
    problem = structure("norm/norm.h", "norm::Problem")
    assert [name for name, _ in problem._fields_] == [
        *("pixels", "dim", "activation", "bfloat16", "eps", "threads")
    ]
    assert problem.eps.offset == 32 and problem(eps=0.5).eps == 0.5
    steps = structure("depthwise/depthwise.h", "depthwise::Problem")
    assert list(steps(stride=(2, 1)).stride) == [2, 1]
    inner = structure("neighborhood/forward.h", "na::ForwardTensors")
    assert inner.key.offset == 48  # behind a structure of another header


def test_parameters_of_functions() -> None:
    mixed = parameters("gated_scan", "gated_scan_mixed")
    assert list(mixed) == ["problem", "tensors", "mixture"]
    assert [name for name, _ in mixed["mixture"]._fields_] == ["eps", "activation"]
    assert parameters("nchw", "nchw_from_nhwc").keys() == {"problem", "in", "affine", "out"}
    assert list(parameters("depthwise", "depthwise_branches").values())[2:] == [None, None]
    with pytest.raises(ValueError, match=r"norm.cpp declares no function norm_backward"):
        parameters("norm", "norm_backward")


def test_unreadable_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"norm.h declares no structure norm::Missing"):
        structure("norm/norm.h", "norm::Missing")
    with pytest.raises(ValueError, match=r"declares no structure other::Problem"):
        structure("norm/norm.h", "other::Problem")


def test_a_header_comes_with_what_it_includes() -> None:
    names = {path.name for path in included(SOURCES / "norm" / "norm.cpp")}
    assert {"norm.cpp", "norm.h", "simd.h", "interface.h"} <= names
