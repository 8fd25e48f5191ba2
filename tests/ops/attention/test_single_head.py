"""Single-head attention against its definition."""

from __future__ import annotations

import pytest
import torch

from ops.attention.single_head import SingleHeadAttention, single_head_attention


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 2)])
def test_definition_and_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 7, *size, dtype=torch.float64, requires_grad=True)
    scores = torch.einsum("bcm,bcn->bmn", q.flatten(2), k.flatten(2)) / 2
    expected = torch.einsum("bmn,bcn->bcm", scores.softmax(-1), v.flatten(2)).view(v.shape)
    value = single_head_attention(q, k, v)
    torch.testing.assert_close(value, expected)
    weight = torch.randn_like(value)
    ours = torch.autograd.grad((value * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_the_rest_of_the_channels_pass_to_the_projection() -> None:
    layer = SingleHeadAttention(10, 3, qk_dim=2).eval()
    layer.proj = torch.nn.Identity()
    x = torch.randn(1, 10, 4, 4)
    assert torch.equal(layer(x)[:, 3:], x[:, 3:].relu())


def test_errors() -> None:
    for attn_dim in (0, 11):
        with pytest.raises(ValueError, match=f"got {attn_dim}"):
            SingleHeadAttention(10, attn_dim)
