"""Operators of exported programs replaced by ones that more runtimes support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def with_common_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in operators that more runtimes support than DeformConv.

    On torch 2.8 this includes average pooling to one pixel: for maps in NHWC, its translation keeps
    the strides by operators on sequences, which OpenVINO lacks.
    """
    table: dict[str, Callable[..., Tensor]] = {
        "torchvision.deform_conv2d.default": sampled_deform_conv2d
    }
    if torch.__version__ < "2.9":  # as versions, not as text
        table["aten.adaptive_avg_pool2d.default"] = _mean_pool
    targets: Any = {node.target for node in program.graph.nodes if node.op == "call_function"}
    replaced = {target: table[str(target)] for target in targets if str(target) in table}
    return program.run_decompositions(replaced) if replaced else program


def _mean_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(size) == (1, 1):
        return x.mean((2, 3), keepdim=True)
    return torch.ops.aten._adaptive_avg_pool2d(x, size)


def sampled_deform_conv2d(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """``torchvision::deform_conv2d`` without masks and groups, by one grid_sample per tap."""
    assert not use_mask and groups == offset_groups == 1
    height, width = x.shape[2:]
    top = torch.arange(offset.shape[2], device=x.device).view(-1, 1) * stride_h - pad_h
    left = torch.arange(offset.shape[3], device=x.device) * stride_w - pad_w
    taps = []
    for tap in range(weight.shape[2] * weight.shape[3]):
        down, right = divmod(tap, weight.shape[3])
        row = offset[:, 2 * tap] + (top + down * dilation_h)
        column = offset[:, 2 * tap + 1] + (left + right * dilation_w)
        # -1 and 1 are the outer edges of the map.
        grid = torch.stack(((2 * column + 1) / width - 1, (2 * row + 1) / height - 1), dim=-1)
        taps.append(F.grid_sample(x, grid, align_corners=False))
    flat = weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]
    return F.conv2d(torch.cat(taps, dim=1), flat, bias)
