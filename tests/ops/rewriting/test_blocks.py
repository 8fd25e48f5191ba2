"""Blocks as rewriting makes them, against their layers one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_kernels import conv_row, random
from operator_graphs import graph_of, names_of
from timm.layers import LayerNorm2d
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from ops import cpu
from ops.cpu import policy
from ops.cpu.attention.grouped import grouped_attention
from ops.inference.conversion import to_channels_last
from ops.rewriting.graph import OperatorGraph
from ops.rewriting.stem import Stem
from ops.rewriting.windows import WindowedAttention


# ---- attention in windows ------------------------------------------------------------------------
def _block(size: tuple[int, int], shift: int, heads: int = 2, side: int = 4) -> nn.Module:
    torch.manual_seed(0)
    block: Any = SwinTransformerBlock(16, size, heads, window_size=side, shift_size=shift)
    nn.init.normal_(block.attn.relative_position_bias_table)
    return block.eval().requires_grad_(False)


def _attention(graph: OperatorGraph) -> list[WindowedAttention]:
    return [o.function for o in graph.operators if isinstance(o.function, WindowedAttention)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(("batch", "heads"), [(1, 2), (3, 1), (3, 2)])
def test_a_swin_block_has_no_copies(batch: int, heads: int, shift: int, dtype: torch.dtype) -> None:
    model, x = _block((12, 8), shift, heads).to(dtype), torch.randn(batch, 12, 8, 16).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    to_channels_last(model, always=True)
    graph = graph_of(model, x)
    expected = ["FastLayerNorm", "FastLinear", "WindowedAttention", "FastLinear", "FeedForward"]
    assert names_of(graph) == expected, str(graph)
    error = (graph(x)[0].double() - exact).abs().max()
    bound = 1e-5 if dtype == torch.float32 else 2**-6 * (1 + exact.abs().max())
    assert error <= bound


def test_windows_are_copied_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_attention, "unavailable", lambda *_: "switched off")
    _check_attention(_block((12, 8), 2), torch.randn(1, 12, 8, 16), 0)


def test_windows_of_a_padded_map() -> None:
    """Attention is in the padded map, from which the map is cut afterwards."""
    model, x = _block((9, 8), 0), torch.randn(1, 9, 8, 16)
    _check_attention(model, x, 1)


def _check_attention(model: nn.Module, x: Tensor, joined: int) -> None:
    expected = copy.deepcopy(model)(x)
    to_channels_last(model, always=True)
    graph = graph_of(model, x)
    assert len(_attention(graph)) == joined, str(graph)
    torch.testing.assert_close(graph(x)[0], expected, rtol=1e-5, atol=1e-5)


class _Attention(nn.Module):
    """Attention in windows of rows, with variations of what surrounds it."""

    def __init__(self, **changes: bool) -> None:
        super().__init__()
        self.changes = changes
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("bias", torch.randn(2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, dim = x.shape
        changes = self.changes.get
        qkv = self.qkv(x.reshape(batch * rows, columns, dim))
        if changes("joined"):  # the parts of a head are beside each other
            parts = qkv.view(-1, columns, 2, 12).transpose(1, 2).chunk(3, -1)
        else:
            parts = qkv.view(-1, columns, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        query, key, value = parts
        if changes("mixed_keys"):
            key = key.flip(2)
        scores = query @ key.transpose(-2, -1)
        table = self.bias[0] if changes("shares_table") else self.bias
        out = (scores + table).softmax(-1) @ value
        if changes("heads_first"):
            out = out.reshape(batch * rows, columns, dim)
        else:
            out = out.transpose(1, 2).reshape(batch * rows, columns, dim)
        out = self.proj(out).view(batch, rows, columns, dim)
        return out.flip(1) if changes("turned") else out


@pytest.mark.parametrize(
    ("change", "is_joined"),
    [
        *[("", True), ("joined", True), ("shares_table", True)],
        *[("mixed_keys", False), ("heads_first", False), ("turned", True)],
    ],
)
def test_only_orders_of_tokens_are_undone(change: str, is_joined: bool) -> None:
    torch.manual_seed(0)
    model = _Attention(**{change: True} if change else {}).eval().requires_grad_(False)
    _check_attention(model, torch.randn(2, 5, 6, 8), is_joined)


# ---- stems ---------------------------------------------------------------------------------------
def _program(model: nn.Module, x: Tensor) -> OperatorGraph:
    return graph_of(model.requires_grad_(False), x)


def _stems(program: OperatorGraph) -> list[Stem]:
    functions = [operator.function for operator in program.operators]
    return [function for function in functions if isinstance(function, Stem)]


ROWS, ACT = (conv_row(3, 8), conv_row(8, 16)), nn.ReLU()


@pytest.mark.parametrize(
    ("layers", "convs"),
    [
        ((*ROWS[0], ACT, *ROWS[1]), 2),
        ((*ROWS[0], LayerNorm2d(8), ACT, *ROWS[1], ACT), 0),
        ((*ROWS[0], *ROWS[1], LayerNorm2d(16), *conv_row(16, 8)), 2),
        ((*ROWS[0], *ROWS[1], ACT, *conv_row(16, 8)), 3),
        ((*ROWS[0], ACT, *ROWS[1], nn.Conv2d(16, 8, 3, 1, 1)), 2),
        (ROWS[0], 0),
        ((nn.Conv2d(3, 3, 1), *ROWS[0], *ROWS[1]), 0),
        ((*ROWS[0], nn.Softplus(), *ROWS[1]), 0),
        ((*ROWS[0], nn.Conv2d(8, 16, 3, 1, 1)), 0),
        ((*ROWS[0], nn.Conv2d(8, 16, 3, 2, 1, groups=2)), 0),
        ((*ROWS[0], nn.Conv2d(8, 16, 3, 2, 1, dilation=2)), 0),
    ],
)
def test_what_is_a_stem(layers: tuple[nn.Module, ...], convs: int) -> None:
    model, x = nn.Sequential(*layers), random(2, 3, 33, 30).float()
    program = _program(model, x)
    assert [len(stem.convs) for stem in _stems(program)] == [convs] * (convs > 0)
    torch.testing.assert_close(program(x)[0], model(x), rtol=1e-4, atol=1e-5)


class _TwoMaps(nn.Sequential):
    def forward(self, x: Tensor) -> list[Tensor]:
        x = self[1](self[0](x))
        return [x, self[2](x)]


def test_a_map_that_something_else_reads_ends_a_stem() -> None:
    model, x = _TwoMaps(*conv_row(3, 8, 8, 8)), random(1, 3, 32, 32).float()
    program = _program(model, x)
    assert [len(stem.convs) for stem in _stems(program)] == [2]
    for made, expected in zip(program(x), model(x), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_odd_channels_of_bfloat16_are_left_to_torch() -> None:
    floats = not policy.multiplies(torch.bfloat16)  # made of it on the way
    even = floats or cpu.instruction_set() != "amx"
    for channels, made in (((3, 16, 33), even), ((3, 15, 32), floats)):
        model, x = nn.Sequential(*conv_row(*channels)).bfloat16(), random(1, 3, 20, 20).bfloat16()
        program = _program(model, x)
        torch.testing.assert_close(program(x)[0], model(x), rtol=0.05, atol=0.02)
        (stem,) = _stems(program)
        assert (stem.derived(x) is not None) == made
