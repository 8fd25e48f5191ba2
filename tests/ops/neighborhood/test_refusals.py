"""What neighborhood attention refuses: with the value, and what would be right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.neighborhood import NeighborhoodAttention2D, na1d_qk, na2d, na2d_av, na2d_qk, na3d_av


def _0(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


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
    (na2d_qk, {"kernel_size": 7}, r"7 · 1 = 7 > 6 along axis 0"),
    (na2d, {"stride": (1, 4)}, r"4 > 3 along axis 1"),
    (na2d, {"backend": "fna"}, r"reference, tiled, .* got 'fna'"),
    (na2d, {"key": MAP[..., :3]}, r"key must be \(1, 8, 6, 2, 4\), got \(1, 8, 6, 2, 3\)"),
    (na2d, {"key": MAP[..., :1, :]}, r"value must be \(1, 8, 6, 1, 4\), got \(1, 8, 6, 2, 4\)"),
    (na2d, {"query": _0(1, 8, 6, 3, 4)}, "divide .* got 2 and 3"),
    (na2d, {"additional_keys": EXTRA}, "both"),
    (
        na2d,
        {"additional_keys": EXTRA, "additional_values": EXTRA[:, 1:]},
        r"additional_values must be \(1, 5, 2, 4\), got \(1, 4",
    ),
    # Scores and sums alone, whose heads come first.
    (na2d_qk, {"key": HEADS_FIRST[:, :1]}, r"same shape, got \(1, 2, 6, 7, 4\) and \(1, 1, 6"),
    (na2d_av, {"additional_values": _0(1, 2, 5, 4)}, r"9 keys of a window and 5 additional ones"),
    # Functions of 0.15 in three dimensions had a size of the first axis apart.
    (na3d_av, {"dilation": 3, "additional_values": 1}, "additional_values must be a tensor, got 1"),
    # Layers.
    (NeighborhoodAttention2D, {"embed_dim": 10, "num_heads": 3}, "3 heads for 10 channels"),
    (NeighborhoodAttention2D, {"num_heads": 0}, "0 heads"),
    (NeighborhoodAttention2D, {"stride": 4}, r"stride .* \(4, 4\) > \(3, 3\)"),
    (NeighborhoodAttention2D, {"small_maps": "crop"}, "one of refuse, .*, got 'crop'"),
    (LAYER, {"x": _0(1, 5, 8)}, "2 axes and 8 channels"),
    (LAYER, {"x": _0(1, 5, 6, 7)}, "8 channels"),
    (LAYER, {"x": _0(1, 2, 6, 8)}, "3 > 2"),
]
WRONG: dict[str, list[Any]] = {
    "kernel_size": [0, 3.0, True, (3, 3, 3), "33"],
    "stride": [-1, (1, 1.5)],
    "dilation": [0, 1.5],
    "is_causal": [1, (True,), "yes"],
    "scale": ["1"],
}


@pytest.mark.parametrize(("function", "changes", "said"), REFUSED)
def test_refused(function: Callable[..., Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError if "must be a tensor" in said else ValueError, match=said):
        function(**{**GOOD[function], **changes})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([_0(2, 5, 4), _0(2, 6, 4)])
    with pytest.raises(ValueError, match="query must not be a nested tensor"):
        na1d_qk(nested, nested, 3)


@pytest.mark.parametrize("function", [na2d, na2d_qk, na2d_av, NeighborhoodAttention2D])
def test_a_wrong_argument_is_refused_by_its_name(function: Callable[..., Any]) -> None:
    """Windows with their value, and tensors of another rank, size, dtype or device."""
    for name in WRONG.keys() & inspect.signature(function).parameters.keys():
        for value in WRONG[name]:
            with pytest.raises(ValueError, match=rf"^{name} .*got {re.escape(repr(value))}"):
                function(**{**GOOD[function], name: value})
    more = {"rpb": _0(2, 5, 5)} if function in (na2d, na2d_qk) else {}
    more |= {"additional_keys": EXTRA, "additional_values": EXTRA} if function is na2d else {}
    given = GOOD[function] | more
    for name, right in given.items():
        if isinstance(right, Tensor):
            for wrong in (right[None], right[:, :-1], right.to("meta"), right.long(), [0.0]):
                # Or by that of the first one that does not fit.
                with pytest.raises((TypeError, ValueError), match=f"{name}|(attn|key|values) must"):
                    function(**{**given, name: wrong})
