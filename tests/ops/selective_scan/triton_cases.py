"""The Triton kernels of the selective scan against the scan in float64.

pytest does not collect this file by its name: ``test_triton.py`` runs it in a process of its own,
where Triton interprets unless there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
from scan_inputs import difference, gradients_of, map_inputs, selective_inputs
from triton_interpreter import quick_interpreter

from ops.selective_scan import cross_selective_scan, selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Triton 3.7 imports a module that Python 3.12 and later warn about.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")


@pytest.fixture(scope="session", autouse=True)
def quickly():
    with quick_interpreter():
        yield


def assert_close(function, given, tolerance=3e-6, dtype=torch.float32, **options):
    expected = gradients_of(function, given, torch.float64, **options, backend="reference")
    moved = {n: t.to(DEVICE) for n, t in given.items()}
    found = gradients_of(function, moved, dtype, **options, backend="triton")
    for name, exact in expected.items():
        assert difference(found[name].cpu(), exact) < tolerance, name


@pytest.mark.parametrize(
    ("channels", "states", "groups"), [(6, 1, 2), (5, 16, 1), (150, 3, 2), (2, 70, 1)]
)
def test_output_and_gradients(channels, states, groups):
    given = selective_inputs(18, channels, states, groups)
    assert_close(selective_scan, given, delta_softplus=True)


def test_extreme_steps_and_rates():
    given = selective_inputs(40, 6, 3, extreme=True)
    assert_close(selective_scan, given, 1e-5, delta_softplus=True)


def test_optional_tensors_and_plain_steps():
    given = selective_inputs(6)
    del given["D"], given["delta_bias"]
    given["delta"] = given["delta"].exp()
    assert_close(selective_scan, given)


def test_a_map_in_four_orders():
    assert_close(cross_selective_scan, map_inputs(3, 4, states=2), delta_softplus=True)


def test_half_precision_and_strides():
    given = {n: t.bfloat16().double() for n, t in selective_inputs(6, states=3).items()}
    given = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in given.items()}
    assert_close(selective_scan, given, 2**-7, torch.bfloat16, delta_softplus=True)


def test_opcheck():
    given = selective_inputs(4, dtype=torch.float32)
    tensors = [t.to(DEVICE).requires_grad_() for t in given.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.vision_backbones.triton_selective_scan
    torch.library.opcheck(operator, (*tensors, True), test_utils=tests)
