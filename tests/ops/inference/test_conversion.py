"""Conversion skips, or names, what would not become faster."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import without_kernels
from timm.layers import RmsNorm2d
from torch import nn

from ops.attention.hilo import HiLoAttention
from ops.attention.large_kernel import DilatedDepthwiseConv2d
from ops.cpu import policy
from ops.inference import conversion
from ops.inference.forms import plain_form


@pytest.mark.parametrize(
    ("multiplied", "dtype", "warnings"),
    [(False, torch.bfloat16, 1), (True, torch.bfloat16, 0), (True, torch.float32, 0)],
)
def test_a_dtype_without_instructions_is_named_once(
    multiplied: bool,
    dtype: torch.dtype,
    warnings: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(policy, "multiplies", lambda _: multiplied)
    conversion._warn_not_faster.cache_clear()
    for _ in range(2):
        model = nn.Sequential(nn.Linear(4, 4)).eval().to(dtype)
        assert conversion.to_channels_last(model, always=False)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warnings
    assert all("no instructions for bfloat16" in line for line in said)


@pytest.mark.parametrize(("always", "has_kernels"), [(False, True), (True, False), (False, False)])
def test_dilated_depthwise_convolutions_stay_in_nchw_without_kernels(
    always: bool, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        without_kernels(monkeypatch)
    model = nn.Sequential(DilatedDepthwiseConv2d(4, 7, 3)).eval()
    assert conversion.to_channels_last(model, always=always) == (always or has_kernels)


@pytest.mark.parametrize("has_kernels", [True, False])
def test_layers_without_their_kernel_stay_plain(
    has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        without_kernels(monkeypatch)
    model = nn.Sequential(RmsNorm2d(4), HiLoAttention(4, 2)).eval()
    assert conversion.to_channels_last(model, always=False)
    assert (type(model[0]) is RmsNorm2d) is not has_kernels
    assert plain_form(model[1]) is HiLoAttention  # which looks for its kernels at each call
