"""Feed-forwards with gates and a response norm against float64; bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_kernels import LINEAR_DTYPES, random, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu.feed_forward.response_mlp import PackedResponseMlp
from ops.cpu.gemm.int8 import int8_unavailable, pack_int8_weight

EPS = 1e-6


def _parts(
    dim: int, squeezed: int, hidden: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = nn.ModuleDict(
        {
            "squeeze": nn.Conv2d(dim, squeezed, 1, bias=bias),
            "excite": nn.Conv2d(squeezed, dim, 1, bias=bias),
            "fc1": nn.Linear(dim, hidden, bias=bias),
            "fc2": nn.Linear(hidden, dim, bias=bias),
        }
    )
    parts.register_buffer("response", torch.randn(1, 1, 1, hidden))
    return parts.requires_grad_(False).to(dtype)


def _packed(parts: nn.ModuleDict, *in_int8: Any) -> PackedResponseMlp:
    layers = [parts[name] for name in ("squeeze", "excite", "fc1", "fc2")]
    return PackedResponseMlp(*layers, parts.response, EPS, *in_int8)


def _exact(parts: nn.ModuleDict, x: Tensor, shortcut: Tensor) -> Tensor:
    x = x.double()
    parts = parts.double()
    squeezed = parts["squeeze"](x.permute(0, 3, 1, 2).mean((2, 3), keepdim=True)).relu()
    x = x * parts["excite"](squeezed).sigmoid().permute(0, 2, 3, 1)
    hidden = nn.functional.gelu(parts["fc1"](x))
    norm = hidden.square().sum((1, 2), keepdim=True).sqrt()
    share = norm / (norm.mean(-1, keepdim=True) + EPS)
    return shortcut.double() + parts["fc2"](hidden * (1 + parts.response * share))


def _check(parts: nn.ModuleDict, x: Tensor) -> None:
    shortcut = random(*x.shape, seed=1).to(x.dtype)
    out = _packed(parts)(x, shortcut)
    assert out.dtype == x.dtype and out.is_contiguous()
    tolerance = 5 * LINEAR_DTYPES[x.dtype]
    expected = _exact(parts, x, shortcut)
    assert (out - expected).abs().max() <= tolerance * (1 + expected.abs().max())


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 23)),
    dims=st.tuples(st.integers(1, 90), st.integers(1, 21), st.integers(1, 200)),
    bias=st.booleans(),
)
def test_equals_the_layers_one_by_one(dtype, batch, size, dims, bias) -> None:
    """Small maps are scaled themselves, of large ones the weights."""
    _check(_parts(*dims, dtype, bias), random(batch, *size, dims[0]).to(dtype))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
def test_groups_of_images_and_threads(dtype: torch.dtype, threads: int) -> None:
    with using_threads(threads):
        _check(_parts(64, 16, 320, dtype), random(5, 56, 41, 64).to(dtype))  # two groups, or three
        _check(_parts(160, 40, 640, dtype), random(11, 12, 13, 160).to(dtype))


@pytest.mark.skipif(
    int8_unavailable(torch.device("cpu"), torch.float32) is not None,
    reason="this CPU has no int8 instructions",
)
@pytest.mark.parametrize("in_int8", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES), ids=str)
def test_layers_in_int8(dtype: torch.dtype, in_int8: tuple[bool, bool]) -> None:
    """Within the error of bytes, for small maps and large ones."""
    for size in ((4, 5), (30, 31)):
        parts = _parts(70, 18, 280, dtype)
        x, shortcut = random(2, *size, 70).to(dtype), random(2, *size, 70, seed=1).to(dtype)
        packed = [
            (*pack_int8_weight(layer.weight), layer.bias.float(), None) if quantized else None
            for layer, quantized in zip((parts["fc1"], parts["fc2"]), in_int8, strict=True)
        ]
        out = _packed(parts, packed)(x, shortcut)
        expected = _exact(parts, x, shortcut) - shortcut
        assert out.dtype == dtype
        assert (out.double() - shortcut - expected).norm() < 0.03 * expected.norm()


def test_means_of_large_maps_are_exact() -> None:
    x = random(1, 500, 400, 5).float() + 100
    _check(_parts(5, 3, 7), x / 100)
