"""What neighborhood attention refuses: with the value, and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.neighborhood import NeighborhoodAttention2D, na1d_qk, na2d, na2d_av, na2d_qk, na3d_av


def _0(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


INTS = torch.int64
MAP, HEADS_FIRST = _0(1, 8, 6, 2, 4), _0(1, 2, 6, 7, 4)
EXTRA = _0(1, 5, 2, 4)
LAYER = NeighborhoodAttention2D(8, 2, 3)
GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    na2d: {"query": MAP, "key": MAP, "value": MAP, "kernel_size": 3},
    na2d_qk: {"query": HEADS_FIRST, "key": HEADS_FIRST, "kernel_size": 3},
    na2d_av: {"attn": _0(1, 2, 6, 7, 9), "value": HEADS_FIRST, "kernel_size": 3},
    na3d_av: {"attn": _0(1, 2, 3, 6, 6, 27), "value": _0(1, 2, 3, 6, 6, 4), "kernel_size": 3},
    NeighborhoodAttention2D: {"embed_dim": 8, "num_heads": 2, "kernel_size": 3},
    LAYER: {},
}
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (na2d, {"kernel_size": 7}, r"7 · 1 = 7 > 6 along axis 1"),
    (na2d, {"kernel_size": (3, 2), "dilation": (3, 1)}, r"3 · 3 = 9 > 8 along axis 0"),
    (na2d, {"stride": (1, 4)}, r"4 > 3 along axis 1"),
    (na2d, {"kernel_size": 0}, r"kernel_size .* got 0"),
    (na2d, {"kernel_size": 3.0}, r"kernel_size .* got 3\.0"),
    (na2d, {"kernel_size": True}, r"kernel_size .* got True"),
    (na2d, {"kernel_size": (3, 3, 3)}, r"kernel_size .* 2 axes"),
    (na2d, {"kernel_size": "33"}, r"kernel_size .* got '33'"),
    (na2d, {"stride": -1}, r"stride .* got -1"),
    (na2d, {"dilation": (1, 1.5)}, r"dilation .* 1\.5"),
    (na2d, {"is_causal": 1}, r"is_causal .* got 1"),
    (na2d, {"is_causal": (True,)}, r"is_causal .* 2"),
    (na2d, {"scale": "1"}, r"scale .* got '1'"),
    (na2d, {"backend": "fna"}, r"reference, tiled, .* got 'fna'"),
    (na2d, {"query": _0(1, 8, 2, 4)}, r"query must be \(batch, height, width"),
    (na2d, {"value": _0(1, 8, 2, 4)}, r"value must be .* got \(1, 8, 2, 4\)"),
    (na2d, {"key": MAP.half()}, "key .* torch.float16"),
    (na2d, {"query": MAP.long()}, "query .* torch.int64"),
    (na2d, {"value": MAP.to("meta")}, "value .* on meta"),
    (na2d, {"key": MAP[:, :5]}, r"agree in batch and map, .* \(1, 5, 6, 2, 4\)"),
    (na2d, {"value": _0(2, 8, 6, 2, 4)}, r"agree in batch and map"),
    (na2d, {"key": MAP[..., :3]}, "same dim, got 4 and 3"),
    (na2d, {"key": MAP[..., :1, :]}, "same heads, got 1 and 2"),
    (na2d, {"value": MAP[..., :1, :]}, "same heads, got 2 and 1"),
    (na2d, {"query": _0(1, 8, 6, 3, 4)}, "divide .* got 2 and 3"),
    (na2d, {"additional_keys": EXTRA}, "both or neither"),
    (
        na2d,
        {"additional_keys": EXTRA[:, 0], "additional_values": EXTRA},
        r"additional_keys must be \(1, any number, 2, 4\), got \(1, 2, 4\)",
    ),
    (
        na2d,
        {"additional_keys": EXTRA, "additional_values": _0(2, 5, 2, 4)},
        "additional_values must be",
    ),
    (na2d, {"additional_keys": EXTRA.half(), "additional_values": EXTRA}, "keys .*torch.float16"),
    (na2d, {"additional_keys": EXTRA, "additional_values": EXTRA[:, 1:]}, "many, got 5 and 4"),
    (na2d, {"rpb": _0(2, 5, 3)}, r"rpb .* \(2, 5, 5\), got \(2, 5, 3\)"),
    (na2d, {"rpb": _0(2, 5, 5, dtype=INTS)}, "rpb .* torch.int64"),
    (na2d, {"rpb": _0(2, 5, 5, device="meta")}, "rpb .* on meta"),
    # Scores and sums alone, whose heads come first.
    (na2d_qk, {"query": HEADS_FIRST[0]}, r"query must be .* got \(2, 6, 7, 4\)"),
    (na2d_qk, {"query": HEADS_FIRST.long()}, r"floating-point .* torch\.int64"),
    (na2d_qk, {"key": HEADS_FIRST[:, :1]}, r"same shape, got \(1, 2, 6, 7, 4\) and \(1, 1, 6"),
    (na2d_qk, {"key": HEADS_FIRST.half()}, r"key must be torch\.float32"),
    (na2d_qk, {"kernel_size": 7}, r"7 · 1 = 7 > 6 along axis 0"),
    (na2d_qk, {"kernel_size": 0}, r"kernel_size .* got 0"),
    (na2d_qk, {"dilation": 1.5}, r"dilation .* got 1\.5"),
    (na2d_qk, {"rpb": _0(2, 5, 3)}, r"rpb must be .*\(2, 5, 5\), got \(2, 5, 3\)"),
    (na2d_qk, {"additional_keys": EXTRA}, r"\(1, 2, any number, 4\), got \(1, 5, 2, 4\)"),
    (na2d_av, {"attn": _0(1, 2, 6, 7, 8)}, r"\(1, 2, 6, 7, 9\), weights for the 9 keys"),
    (na2d_av, {"additional_values": _0(1, 2, 5, 4)}, r"9 keys of a window and 5 additional ones"),
    (na2d_av, {"value": None}, "value must be a tensor, got None"),
    # Functions of 0.15 in three dimensions had a size of the first axis apart.
    (na3d_av, {"dilation": 3, "additional_values": 1}, "additional_values must be a tensor, got 1"),
    # Layers.
    (NeighborhoodAttention2D, {"embed_dim": 10, "num_heads": 3}, "3 heads for 10 channels"),
    (NeighborhoodAttention2D, {"num_heads": 0}, "0 heads"),
    (NeighborhoodAttention2D, {"kernel_size": 0}, "kernel_size .* got 0"),
    (NeighborhoodAttention2D, {"kernel_size": (3, 3, 3)}, "kernel_size .* 2 axes"),
    (NeighborhoodAttention2D, {"stride": 4}, r"stride .* \(4, 4\) > \(3, 3\)"),
    (NeighborhoodAttention2D, {"dilation": 0}, "dilation .* got 0"),
    (NeighborhoodAttention2D, {"is_causal": "yes"}, "is_causal .* 'yes'"),
    (NeighborhoodAttention2D, {"small_maps": "crop"}, "one of refuse, .*, got 'crop'"),
    (LAYER, {"x": _0(1, 5, 8)}, "2 axes and 8 channels"),
    (LAYER, {"x": _0(1, 5, 6, 7)}, "8 channels"),
    (LAYER, {"x": _0(1, 2, 6, 8)}, "3 > 2"),
]


@pytest.mark.parametrize(("function", "changes", "said"), REFUSED)
def test_refused(function: Callable[..., Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError if "must be a tensor" in said else ValueError, match=said):
        function(**{**GOOD[function], **changes})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([_0(2, 5, 4), _0(2, 6, 4)])
    with pytest.raises(ValueError, match="query must not be a nested tensor"):
        na1d_qk(nested, nested, 3)
