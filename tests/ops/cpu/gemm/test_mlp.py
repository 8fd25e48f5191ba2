"""Two linear layers in one pass against float64; bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import LINEAR_DTYPES, linear_layer, random, using_threads

from ops.cpu.gemm.linear import pack_weight
from ops.cpu.gemm.mlp import packed_mlp


@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(3, 5), (31, 43)])
@pytest.mark.parametrize("dims", [(24, 70, 24), (64, 1500, 40)])
def test_is_both_layers(dtype, threads, size, dims) -> None:
    """Some rows at a time where there are many, from inputs that lie apart."""
    dim, hidden, out_dim = dims
    x = random(2, *size, dim + 3).to(dtype)[..., :dim]
    residual = random(2, *size, out_dim + 1, seed=3).to(dtype)[..., 1:]
    weight1, bias1, first = linear_layer(dim, hidden, dtype)
    weight2, bias2, second = linear_layer(hidden, out_dim, dtype)
    between = F.gelu(F.linear(x.double(), weight1, bias1)).to(dtype).double()
    expected = F.linear(between, weight2, bias2)
    with using_threads(threads):
        out = packed_mlp(x, *first, *second, "gelu")
        added = packed_mlp(x, *first, *second, "gelu", residual)
    assert out.dtype == dtype and out.is_contiguous() and added.is_contiguous()
    tolerance = 2 * LINEAR_DTYPES[dtype] * expected.abs().max()
    assert (out - expected).abs().max() < tolerance
    assert (added - expected - residual).abs().max() < tolerance


def test_rejects_bad_arguments() -> None:
    packed = pack_weight(torch.ones(5, 8)), torch.zeros(5)
    back = pack_weight(torch.ones(8, 5)), torch.zeros(8)
    x = torch.zeros(2, 3, 8)
    for message, *arguments in (
        (r"got .2, 3, 7. and", x[..., :7], *packed, *back),
        (r"got .2, 3, 5. and", x, *packed, *packed),
        (r"must be one of .*got 'softplus'", x, *packed, *back, "softplus"),
        (r"other must be .2, 3, 8., got .2, 3, 5.", x, *packed, *back, "relu", x[..., :5]),
        (r"x is torch.bfloat16 and its weight torch.float32", x.bfloat16(), *packed, *back),
        (
            "other must be torch.float32, got torch.bfloat16",
            x,
            *packed,
            *back,
            "relu",
            x.bfloat16(),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            packed_mlp(*arguments)
    assert packed_mlp(x[:0], *packed, *back).shape == (0, 3, 8)
