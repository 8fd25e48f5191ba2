"""The reference backend against brute force, and with symbolic sizes."""

from __future__ import annotations

import pytest
import torch
from neighborhood_oracle import assert_exact, random_case
from torch.export import Dim

from ops.neighborhood import NeighborhoodAttention2D, na1d, na2d, na3d


@pytest.mark.parametrize("seed", range(60))
def test_random_case(seed: int) -> None:
    assert_exact(random_case(seed), "reference", torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_many_random_cases(dtype: torch.dtype) -> None:
    for seed in range(500):
        assert_exact(random_case(seed), "reference", dtype)


def test_by_hand() -> None:
    # Four positions, windows of three, equal scores: every output is the mean of its window.
    value = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    zero = torch.zeros_like(value)
    out = na1d(zero, zero, value, kernel_size=3, backend="reference")
    assert torch.allclose(out.flatten(), torch.tensor([7.0, 7.0, 14.0, 14.0]) / 3)
    out = na1d(zero, zero, value, kernel_size=3, is_causal=True, backend="reference")
    assert torch.allclose(out.flatten(), torch.tensor([1.0, 1.5, 7 / 3, 14 / 3]))
    out = na1d(zero, zero, value, kernel_size=2, dilation=2, backend="reference")
    assert torch.allclose(out.flatten(), torch.tensor([2.5, 5.0, 2.5, 5.0]))
    out = na1d(zero, zero, value, kernel_size=2, stride=2, backend="reference")
    assert torch.allclose(out.flatten(), torch.tensor([1.5, 1.5, 6.0, 6.0]))
    # Even windows reach one further to the left.
    out = na1d(zero, zero, value, kernel_size=2, backend="reference")
    assert torch.allclose(out.flatten(), torch.tensor([1.5, 1.5, 3.0, 6.0]))


class _Attention(torch.nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.attention = (na1d, na2d, na3d)[rank - 1]
        self.is_causal = (True, *(False,) * (rank - 1))

    def forward(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention(
            query, query, query, 3, stride=2, dilation=2, is_causal=self.is_causal, return_lse=True
        )


@pytest.mark.parametrize(
    ("rank", "strict"), [pytest.param(1, True, marks=pytest.mark.slow), (2, False)]
)
def test_export_with_dynamic_sizes(rank: int, strict: bool) -> None:
    module = _Attention(rank)
    axes = {0: Dim("batch"), **{i + 1: Dim(f"n{i}", min=6) for i in range(rank)}}
    example = torch.randn(2, *(7, 8, 9)[:rank], 2, 4)
    program = torch.export.export(module, (example,), dynamic_shapes=(axes,), strict=strict)
    # Plain torch operators only, which every runtime and the ONNX exporter know.
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    spaces = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
    assert spaces == {"aten"}
    for size in ((7, 8, 9), (6, 13, 10)):
        query = torch.randn(3, *size[:rank], 2, 4)
        for got, true in zip(program.module()(query), module(query), strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.parametrize("small_maps", ["refuse", "shrink"])
def test_export_of_a_layer_without_a_least_size(small_maps: str) -> None:
    options = {"is_causal": (True, False), "rel_pos_bias": True, "small_maps": small_maps}
    layer = NeighborhoodAttention2D(8, 2, 3, **options).eval()
    dynamic = dict.fromkeys(range(3), Dim.DYNAMIC)
    program = torch.export.export(layer, (torch.randn(2, 5, 6, 8),), dynamic_shapes=(dynamic,))
    x = torch.randn(3, 4, 11, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_double_backward() -> None:
    query = torch.randn(1, 5, 1, 2, dtype=torch.float64, requires_grad=True)

    def attention(query: torch.Tensor) -> torch.Tensor:
        return na1d(query, query, query, 3, backend="reference")

    assert torch.autograd.gradgradcheck(attention, query)
