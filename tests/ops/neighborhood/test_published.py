"""Neighborhood attention with a position bias, as the published medical models were run with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backbones.cli.parity import reference, summary_error, uniform
from ops.neighborhood import na2d

CASES = reference("medvitv2", "medvitv2_tiny")["na_cases"]["cases"]


@pytest.mark.parametrize("backend", ["reference", "tiled", "cpu", None])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_natten_with_bias(number: int, backend: str | None) -> None:
    case: dict[str, Any] = CASES[number]
    kernel, heads = case["kernel_size"], case["qkv"][1]
    # The figures have heads first.
    query, key, value = (
        torch.from_numpy(uniform(f"na-{number}-{name}", case["qkv"])).permute(0, 2, 3, 1, 4)
        for name in "qkv"
    )
    rpb = None
    if case["rpb"]:
        rpb = torch.from_numpy(uniform(f"na-{number}-rpb", (heads, 2 * kernel - 1, 2 * kernel - 1)))
    out = na2d(
        query,
        key,
        value,
        kernel,
        dilation=case["dilation"],
        scale=case["scale"],
        rpb=rpb,
        backend=backend,
    )
    assert summary_error(out.permute(0, 3, 1, 2, 4), case["out"]) < 1e-5
