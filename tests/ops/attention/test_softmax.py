"""Softmax attention equals torch's, except that NaN propagates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.attention.softmax import softmax_attention

KEYS = (1, 2, 4, 7, 8, 15, 16, 17, 49)


def tensors(keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    return [
        torch.randn(2, 3, n, 8, generator=generator).to(dtype).requires_grad_()
        for n in (5, keys, keys)
    ]


@torch.no_grad()
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_propagates(which: str, dtype: torch.dtype, keys: int) -> None:
    """Where the formula has it; torch loses it if there are few keys."""
    query, key, value = tensors(keys, dtype)
    {"query": query, "key": key, "value": value}[which][0, 0, 0, 0] = float("nan")
    weights = (query @ key.transpose(2, 3) / 8**0.5).softmax(3)
    assert torch.equal(softmax_attention(query, key, value).isnan(), (weights @ value).isnan())


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("keys", KEYS)
def test_otherwise_as_in_torch(keys: int, scale: float | None) -> None:
    inputs = tensors(keys)
    out = softmax_attention(*inputs, scale=scale)
    expected = F.scaled_dot_product_attention(*inputs, scale=scale)
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_compiles_with_a_symbolic_number_of_keys() -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return softmax_attention(query, key, value)

    keys = torch.export.Dim("keys", min=1, max=99)
    exported = torch.export.export(
        Attention(), tuple(tensors(5)), dynamic_shapes=({}, {2: keys}, {2: keys})
    )
    inputs = tensors(40)
    torch.testing.assert_close(exported.module()(*inputs), softmax_attention(*inputs))
