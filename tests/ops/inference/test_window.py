"""Window attention in place against the plain layers, which copy windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_kernels import compiled_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops import cpu
from ops.attention.window import OverlappingWindowAttention, WindowAttention
from ops.cpu.attention.grouped import grouped_attention
from ops.inference.layers import FastLinear, convert
from ops.inference.window import FastOverlappingWindowAttention, FastWindowAttention


def _error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


def _layer(heads: int, head_dim: int, window_size: int, shift_size: int | None = None) -> Any:
    """Of overlapping windows, unless there is a shift; biases matter beside the scores."""
    given = heads * head_dim, window_size, heads
    overlaps = shift_size is None
    layer = (
        OverlappingWindowAttention(*given, 1.0) if overlaps else WindowAttention(*given, shift_size)
    )
    nn.init.normal_(layer.relative_position_bias_table)
    return layer.eval().requires_grad_(False)


def _fast(layer: nn.Module) -> Any:
    fast = copy.deepcopy(layer)
    for part in (fast.qkv, fast.proj):
        convert(part, FastLinear)
    overlaps = isinstance(layer, OverlappingWindowAttention)
    return convert(fast, FastOverlappingWindowAttention if overlaps else FastWindowAttention)


def _map(layer: Any, batch: int, rows: int, columns: int) -> Tensor:
    side = layer.window_size
    return torch.randn(batch, rows * side, columns * side, layer.qkv.in_features)


@settings(max_examples=40)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    window_size=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]),
    shift=st.integers(0, 15),
    size=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    overlaps=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_is_the_layer(heads, head_dim, window_size, shift, size, overlaps, dtype) -> None:
    torch.manual_seed(0)
    if overlaps:
        layer = _layer(heads, head_dim, window_size + window_size % 2)
    else:
        layer = _layer(heads, head_dim, window_size, shift % window_size)
    x = _map(layer, *size)
    layer, x = layer.to(dtype), x.to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    out = _fast(layer)(x)
    assert out.dtype == dtype
    assert _error(out.double(), exact) <= (5e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_other_instruction_sets(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_for(instructions, monkeypatch)
    for layer in (_layer(2, 9, 7, 3), _layer(2, 9, 6)):
        for dtype, bound in ((torch.float32, 5e-6), (torch.bfloat16, 0.02)):
            x = _map(layer, 1, 2, 2).to(dtype)
            exact = copy.deepcopy(layer).to(dtype).double()(x.double())
            assert _error(_fast(layer).to(dtype)(x).double(), exact) <= bound
    assert cpu.status("attention").instruction_set == instructions


def test_another_default_device_does_not_matter() -> None:
    """For the tables that are kept from the first call on."""
    for layer in (_layer(2, 3, 5, 1), _layer(2, 3, 10)):
        fast, x = _fast(layer), _map(layer, 1, 2, 1)
        with torch.device("meta"):
            out = fast(x)
        assert _error(out, layer(x)) <= 1e-5


VALUES, LINES = torch.zeros(2, 3, 16), torch.zeros(1, 1, 4, dtype=torch.int32)
ROWS, TERMS = torch.arange(8, dtype=torch.int32).view(2, 4), r"(terms|lines|kinds|key_rows) must be"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        *(({"terms": v}, TERMS) for v in (VALUES[:1], VALUES[..., :8], VALUES[0, 0])),
        ({"lines": LINES[..., :3]}, TERMS),
        ({"kinds": torch.zeros(3, dtype=torch.int32)}, TERMS),
        ({"key_rows": ROWS[:1]}, TERMS),
        ({"rows": ROWS[:1], "key_rows": ROWS[:1]}, r"rows must share out 8 tokens.*\(1, 4\)"),
        ({"lines": LINES.long()}, "lines must be torch.int32, got torch.int64"),
    ],
)
def test_rejects_bad_arguments(changed: dict[str, Tensor], said: str) -> None:
    x, given = torch.zeros(1, 8, 2, 4), {"rows": ROWS, "key_rows": ROWS, "lines": LINES}
    with pytest.raises(ValueError, match=said):
        grouped_attention(x, x, x, x.clone(), **{"terms": VALUES, **given, **changed})
