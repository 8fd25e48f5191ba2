"""Attention in windows as rewriting makes it, against partitions of the map."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from ops.cpu.attention.grouped import grouped_attention
from ops.inference.conversion import to_channels_last
from ops.rewriting import windows
from ops.rewriting.graph import OperatorGraph
from ops.rewriting.program import Program
from ops.rewriting.recorder import record
from ops.rewriting.rewrite import rewrite
from ops.rewriting.windows import WindowedAttention


def _block(size: tuple[int, int], shift: int, heads: int = 2, side: int = 4) -> nn.Module:
    torch.manual_seed(0)
    block: Any = SwinTransformerBlock(16, size, heads, window_size=side, shift_size=shift)
    nn.init.normal_(block.attn.relative_position_bias_table)
    return block.eval().requires_grad_(False)


def _rewritten(model: nn.Module, x: Tensor) -> OperatorGraph:
    graph = record(model, model, x)
    rewrite(graph)
    return graph


def _attention(graph: OperatorGraph) -> list[WindowedAttention]:
    return [o.function for o in graph.operators if isinstance(o.function, WindowedAttention)]


def _names(graph: OperatorGraph) -> list[str]:
    return [o.name for o in graph.operators if "reshape" not in o.name]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_swin_block_has_no_copies(batch: int, shift: int, heads: int) -> None:
    model, x = _block((12, 8), shift, heads), torch.randn(batch, 12, 8, 16)
    exact = copy.deepcopy(model).double()(x.double())
    to_channels_last(model, always=True)
    graph = _rewritten(model, x)
    expected = ["FastLayerNorm", "FastLinear", "WindowedAttention", "FastLinear", "FeedForward"]
    assert _names(graph) == expected, str(graph)
    torch.testing.assert_close(Program(graph)(x).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 2])
def test_bfloat16(shift: int) -> None:
    model, x = _block((8, 8), shift), torch.randn(2, 8, 8, 16).bfloat16()
    exact = copy.deepcopy(model).double()(x.double())
    half = model.bfloat16()
    to_channels_last(half, always=True)
    graph = _rewritten(half, x)
    assert len(_attention(graph)) == 1
    error = (Program(graph)(x).double() - exact).abs().max()
    assert error <= 2**-6 * (1 + exact.abs().max())


@pytest.mark.parametrize("shift", [0, 2])
def test_without_the_kernel(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _block((8, 12), shift), torch.randn(2, 8, 12, 16)
    expected = copy.deepcopy(model)(x)
    to_channels_last(model, always=True)
    graph = _rewritten(model, x)
    monkeypatch.setattr(grouped_attention, "unavailable", lambda *_: "switched off")
    assert len(_attention(graph)) == 1
    torch.testing.assert_close(Program(graph)(x), expected, rtol=1e-5, atol=1e-5)


def test_windows_of_a_padded_map() -> None:
    """Attention is in the padded map, from which the map is cut afterwards."""
    model, x = _block((9, 8), 0), torch.randn(1, 9, 8, 16)
    expected = copy.deepcopy(model)(x)
    to_channels_last(model, always=True)
    graph = _rewritten(model, x)
    assert len(_attention(graph)) == 1
    torch.testing.assert_close(Program(graph)(x), expected, rtol=1e-5, atol=1e-5)


def test_large_maps_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_MOST_INDICES", 16)
    model, x = _block((8, 8), 0), torch.randn(1, 8, 8, 16)
    assert not _attention(_rewritten(model, x))


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
        scores = scores * 0.3 + self.bias if changes("scales_scores") else scores + self.bias
        out = scores.softmax(-1) @ value
        if changes("heads_first"):
            out = out.reshape(batch * rows, columns, dim)
        else:
            out = out.transpose(1, 2).reshape(batch * rows, columns, dim)
        out = self.proj(out).view(batch, rows, columns, dim)
        return out.flip(1) if changes("turned") else out


@pytest.mark.parametrize(
    ("change", "is_joined"),
    [
        *[("", True), ("joined", True), ("scales_scores", True)],
        *[("mixed_keys", False), ("heads_first", False), ("turned", True)],
    ],
)
def test_only_orders_of_tokens_are_undone(change: str, is_joined: bool) -> None:
    torch.manual_seed(0)
    model = _Attention(**{change: True} if change else {}).eval().requires_grad_(False)
    x = torch.randn(2, 5, 6, 8)
    expected = copy.deepcopy(model)(x)
    to_channels_last(model, always=True)
    graph = _rewritten(model, x)
    assert len(_attention(graph)) == is_joined, str(graph)
    torch.testing.assert_close(Program(graph)(x), expected, rtol=1e-5, atol=1e-5)
