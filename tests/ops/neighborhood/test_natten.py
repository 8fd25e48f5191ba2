"""NATTEN as a second oracle of the definition, and as a backend.

What PyPI installs is NATTEN without kernels; on the CPU it runs on torch's flex attention, forward
only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import natten as library
import pytest
import torch
from neighborhood_oracle import NA, Case, Limits, error, make_inputs, random_case
from torch import Tensor

from ops.neighborhood import na1d, na2d, natten, reference
from ops.neighborhood._geometry import Inputs, NAParams

NATTEN = {1: library.na1d, 2: library.na2d, 3: library.na3d}

pytestmark = [
    # Both about how NATTEN calls torch.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:return_lse is deprecated"),
]


def _cases_of_natten(seeds: range) -> list[Case]:
    """The random cases that NATTEN can do on the CPU."""
    sizes = {"dims": (16,), "max_size": {1: 24, 2: 7, 3: 4}}
    limits = Limits(**sizes, value_dim_differs=False, rpb=False, extra=False)
    cases = [replace(random_case(seed, limits), return_lse=True) for seed in seeds]
    # Its path for whole maps takes no causal axis and no strides on the CPU.
    cases = [case for case in cases if case.kernel_size != case.size]
    return [case for case in cases if min(case.kernel_size) > 1 and case.scale != 0]


@pytest.mark.parametrize(
    "cases",
    [
        *([case] for case in _cases_of_natten(range(16))),
        pytest.param(_cases_of_natten(range(16, 3000)), marks=pytest.mark.slow, id="many"),
    ],
    ids=lambda cases: str(cases[0].seed),
)
def test_natten_agrees(cases: list[Case]) -> None:
    for case in cases:
        inputs = make_inputs(case, torch.float32).present()
        true = NATTEN[case.rank](**inputs, **case.arguments, return_lse=True)
        for backend in ("reference", "tiled", None):
            got = NA[case.rank](**inputs, **case.arguments, return_lse=True, backend=backend)
            for name, a, b in zip(("out", "lse"), got, true, strict=True):
                assert error(a, b) < 5e-6, (backend, name, case)


@pytest.mark.parametrize("extra", [0, 5])
def test_as_backend(extra: int) -> None:
    window = ((9, 8), (3, 4), (1, 2), (2, 1), (True, False))
    case = Case(*window, dim=16, value_dim=16, extra=extra, packed=True)
    tensors = make_inputs(case, torch.float32).present()
    got = na2d(**tensors, **case.arguments, return_lse=True, backend="natten")
    true = na2d(**tensors, **case.arguments, return_lse=True, backend="reference")
    torch.testing.assert_close(got, true)


@pytest.mark.parametrize(
    ("dim", "more", "reason"),
    [
        (16, {"rpb": torch.zeros(2, 5)}, "bias"),
        (16, {"scale": 0.0}, "scale"),
        (16, {"kernel_size": 1}, "kernel sizes"),
        (17, {}, "no kernel for head dims 17"),
    ],
)
def test_refuses_what_natten_cannot_do(dim: int, more: dict[str, Any], reason: str) -> None:
    tensors = torch.randn(3, 1, 9, 2, dim)
    assert not natten.is_fused(Inputs(*tensors))
    with pytest.raises(NotImplementedError, match=reason):
        na1d(*tensors, **{"kernel_size": 3, **more}, backend="natten")


def test_refuses_gradients_and_compilation_on_the_cpu() -> None:
    with pytest.raises(NotImplementedError, match="no backward on CPU"):
        na1d(*torch.randn(3, 1, 9, 2, 16, requires_grad=True), 3, backend="natten")
    compiled = torch.compile(lambda *t: na1d(*t, 3, backend="natten"), backend="eager")
    # Torch may put an error of its own around ours.
    with pytest.raises((NotImplementedError, RuntimeError), match="cannot be compiled on CPU"):
        compiled(*torch.randn(3, 1, 9, 2, 16))


def test_says_that_natten_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natten, "_library", lambda: None)
    assert not natten.is_fused(Inputs(*torch.randn(3, 1, 9, 2, 16)))
    with pytest.raises(NotImplementedError, match="pip install natten"):
        na1d(*torch.randn(3, 1, 9, 2, 16), 3, backend="natten")


@pytest.mark.parametrize("extra", [False, True])
def test_gradient_of_the_lse(monkeypatch: pytest.MonkeyPatch, extra: bool) -> None:
    # NATTEN's kernels give no gradient of the lse. Here the reference, without its own, stands in
    # for them.
    params = NAParams((3, 4), (2, 1), (1, 2), (False, True), 0.7)

    def kernels(inputs: Inputs, params: NAParams) -> tuple:
        out, lse = reference.attend(inputs, params)
        return out, lse.detach()

    monkeypatch.setattr(natten, "_run", kernels)
    shapes = [(2, 7, 9, 4, 5), (2, 7, 9, 2, 5), (2, 7, 9, 2, 3), (2, 3, 2, 5), (2, 3, 2, 3)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    arguments = tensors if extra else tensors[:3]
    weights = torch.randn(2, 7, 9, 4, dtype=torch.float64)

    def gradients(backend: object) -> tuple[Tensor, ...]:
        out, lse = backend.attend(Inputs(*arguments), params)
        return torch.autograd.grad(out.square().sum() + (lse * weights).sum(), arguments)

    torch.testing.assert_close(gradients(natten), gradients(reference))
