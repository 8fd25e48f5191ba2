"""What a kernel, or what packs weights for it, cannot compute is refused by name.

Other dtypes, shapes and activations are refused by the laws of ``test_laws.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_kernels import conv_row
from kernel_calls import CALLS
from torch import Tensor, nn

from ops.cpu.attention.cascaded import PackedCascadedAttention
from ops.cpu.attention.grouped import attend, grouped_attention
from ops.cpu.deformable.deformable_conv import deformable_conv2d, pack_taps
from ops.cpu.depthwise.conv import depthwise_branches, depthwise_conv2d, unavailable
from ops.cpu.direct.direct_conv import DirectConv2d
from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp, PackedExpansion
from ops.cpu.feed_forward.response_mlp import PackedResponseMlp
from ops.cpu.gemm.convolution import PackedConv2d
from ops.cpu.gemm.int8 import LARGEST_INPUT, int8_unavailable, pack_int8_weight
from ops.cpu.gemm.linear import pack_weight, packed_linear
from ops.cpu.stem.packed_stem import NCHWConv2d, pack_layers, packed_stem
from ops.cpu.winograd.winograd import WinogradConv2d

_0 = torch.zeros
_NONE = ["none", "none"]
# Convolutions of which each kernel lacks something.
OTHER_CONVS = [
    *(nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 3, 2)),
    *(nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same")),
    *(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3).bfloat16()),
]


def _call(name: str, **changes: Any) -> object:
    kernel, _, given = CALLS[name]()
    return kernel(**{**given, **changes})


def _parts(dim: int, hidden: int, side: int = 3) -> tuple[nn.Linear, nn.Conv2d, nn.Linear]:
    conv = nn.Conv2d(hidden, hidden, side, padding=side // 2, groups=hidden)
    return nn.Linear(dim, hidden), conv, nn.Linear(hidden, dim)


def _mlp(x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None) -> Tensor:
    return PackedDepthwiseMlp(*_parts(5, 7))(x, residual, norm)


def _expansion(x: Tensor, hidden: int = 16) -> object:
    return PackedExpansion(*_parts(8, hidden)[:2])(x)


def _response(x: Tensor, shortcut: Tensor) -> Tensor:
    gates = nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1)
    layers = nn.Linear(5, 7), nn.Linear(7, 5)
    return PackedResponseMlp(*gates, *layers, _0(1, 1, 1, 7), 1e-6)(x, shortcut)


def _conv(x: Tensor, activation: str = "none", **options: Any) -> Tensor:
    conv = nn.Conv2d(16, 8, 3, **options).requires_grad_(False)
    return PackedConv2d(conv)(x, activation)


def _winograd(x: Tensor) -> Tensor:
    return WinogradConv2d(nn.Conv2d(16, 16, 3).requires_grad_(False))(x)


def _direct(x: Tensor) -> Tensor:
    return DirectConv2d(nn.Conv2d(16, 8, 3, groups=2).requires_grad_(False))(x)


def _stem(x: Tensor, activations: list[str], **window: Any) -> Tensor:
    return packed_stem(x, *pack_layers(conv_row(3, 8, 16)), activations, **window)


def _cascaded(x: Tensor, table: Tensor | None = None) -> Tensor:
    return PackedCascadedAttention([nn.Conv2d(8, 16, 1) for _ in range(2)], 4, [], None)(x, table)


def _deformable(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return deformable_conv2d(x, offset, weight, _0(8), 2, 2)


def _regions(rows: Tensor) -> object:
    x = _0(1, 6, 2, 8)
    return grouped_attention(x, x, x, x.clone(), rows)


def _packed(*arguments: Any, x: Tensor | None = None, **named: Any) -> Tensor:
    x = _0(2, 5) if x is None else x
    return packed_linear(x, pack_weight(_0(3, 5)), _0(3), *arguments, **named)


X, MAP, TAPS = _0(1, 6, 2, 8), _0(1, 4, 8, 8), _0(3, 3, 4)
Case = tuple[Callable[[], object], str]
CASES: list[Case] = [
    # Attention.
    (lambda: attend(X, X[..., :7], X, X.clone()), r"key must be \(1, 6, 2, 8\), got"),
    (lambda: attend(X, X, X.bfloat16(), X.clone()), "value must be torch.float32, got torch.bf"),
    (lambda: _regions(_0(2, 2, dtype=torch.int32)), r"rows must share out 6 tokens.*\(2, 2\)"),
    (lambda: _cascaded(_0(1, 3, 3, 15)), r"x must be \(N, H, W, dim\) of torch.float32.*2 × 8"),
    (lambda: _cascaded(_0(3, 3, 16)), r"x must be \(N, H, W, dim\) of torch.float32.*2 × 8"),
    (lambda: _cascaded(_0(1, 3, 3, 16), _0(2, 9, 8)), r"must be \(2, 9, 9\), got \(2, 9, 8\)"),
    # Linear layers.
    (lambda: pack_weight(_0(3)), "weight must be .out_features, in_features., got"),
    (lambda: pack_weight(_0(3, 5, 1, 1)), "weight must be .out_features, in_features., got"),
    (lambda: _packed(combination="add"), "combination must be one of"),
    (lambda: _packed("none", _0(2, 3), "add_scaled"), r"must be .3,. with 'add_scaled', got None"),
    (
        lambda: _packed("none", _0(2, 3), "add", other_scale=_0(3)),
        "other_scale must be None with 'add', got .3,.",
    ),
    # Convolutions.
    (lambda: _conv(_0(1, 8, 5, 5)), r"\(B, 16, H, W\) of torch.float32, got \(1, 8, 5, 5\)"),
    (lambda: _conv(_0(1, 16, 2, 5)), r"map of \(2, 5\).*smaller than the window of \(3, 3\)"),
    (lambda: _conv(_0(1, 16, 5, 5), groups=2), "no groups and no dilation"),
    (lambda: _conv(_0(1, 16, 5, 5), padding=1, padding_mode="circular"), "number of zeros"),
    (lambda: _winograd(_0(1, 40, 5, 5)), r"channels of the weight, got \(1, 40, 5, 5\)"),
    (lambda: _winograd(_0(1, 16, 2, 5)), r"map of \(2, 5\).*smaller than the window of \(3, 3\)"),
    *(
        (lambda c=conv: WinogradConv2d(c), "must be a 3×3 in float32 without stride")
        for conv in OTHER_CONVS
    ),
    *(
        (lambda x=x: _direct(x), "with the channels and dtype of the weight, got")
        for x in (_0(1, 8, 5, 5), _0(1, 17, 5, 5), _0(16, 5, 5), _0(1, 16, 5, 5).bfloat16())
    ),
    (lambda: _direct(_0(1, 16, 2, 5)), r"map of \(2, 5\).*smaller than the window of \(3, 3\)"),
    *(
        (lambda c=conv: DirectConv2d(c), "without dilation, padded with zeros, got")
        for conv in (*OTHER_CONVS[2:5], nn.Conv2d(4, 4, 3).double(), nn.Conv2d(3, 4, 3).bfloat16())
    ),
    (lambda: depthwise_conv2d(MAP, _0(3, 3, 5)), "got .1, 4, 8, 8. and .3, 3, 5."),
    (lambda: depthwise_conv2d(MAP[:, :, :2], TAPS), "a map of 2×8"),
    (lambda: depthwise_branches(MAP, [TAPS] * 2, [_0(4)] * 2), "at most 4 channels together"),
    (lambda: depthwise_branches(MAP, [TAPS], [_0(3)]), r"biases \(c,\)"),
    (lambda: depthwise_branches(MAP, [_0(3, 2, 4)], [_0(4)]), "must be odd"),
    (
        lambda: _deformable(_0(1, 8, 7, 7), _0(1, 8, 4, 4), pack_taps(_0(8, 8, 2, 2))),
        r"offset must be \(1, 8, 3, 3\), got \(1, 8, 4, 4\)",
    ),
    (
        lambda: _deformable(_0(1, 8, 8, 8), _0(1, 8, 4, 4), pack_taps(_0(8, 8, 2, 2))[:160]),
        "not packed for 8 outputs of 32 inputs",
    ),
    (lambda: _stem(_0(1, 3, 8, 8), ["none"]), "one activation per layer"),
    (lambda: _stem(_0(1, 3, 8, 8), ["none", "softplus"]), "'softplus'"),
    (lambda: _stem(_0(1, 7, 8, 8), _NONE), "7 to 8 channels"),
    (lambda: _stem(_0(1, 3, 8, 8), _NONE, window=(3, 3, 1)), r"a stride of \(2, 4\).*\(3, 3, 1\)"),
    (
        lambda: packed_stem(_0(1, 3, 9, 9).bfloat16(), *pack_layers(conv_row(3, 15, 32)), _NONE),
        "must have even channels, got 15",
    ),
    (
        lambda: NCHWConv2d(nn.Conv2d(3, 32, 4, 4))(_0(1, 3, 2, 50), "none"),
        r"image of \(2, 50\) with padding 0.*window of 4×4",
    ),
    (
        lambda: NCHWConv2d(nn.Conv2d(3, 32, 3, 3)),
        r"square windows 2 or 4 apart.*stride=\(3, 3\)",
    ),
    # Feed-forwards.
    (lambda: _mlp(_0(1, 3, 3, 4)), "float32 with 5 features"),
    (lambda: _mlp(_0(3, 3, 5)), r"\(B, H, W, 5\), got \(3, 3, 5\)"),
    (lambda: _mlp(_0(1, 3, 3, 5), norm=nn.LayerNorm(4)), "weight and bias of 5 features"),
    (
        lambda: _mlp(_0(1, 3, 3, 5), norm=nn.LayerNorm(5, elementwise_affine=False)),
        "weight and bias of 5 features",
    ),
    (lambda: _mlp(_0(1, 3, 3, 5), _0(1, 3, 3, 9)), r"must be \(1, 3, 3, 5\), got \(1, 3, 3, 9\)"),
    (
        lambda: PackedDepthwiseMlp(None, *_parts(8, 16)[1:])(
            _0(1, 4, 4, 16), None, nn.LayerNorm(16)
        ),
        "no norm precede it",
    ),
    (
        lambda: PackedDepthwiseMlp(None, *_parts(8, 8)[1:])(_0(1, 4, 4, 8)),
        "16 features or more, got 8",
    ),
    (lambda: _expansion(_0(1, 0, 4, 8)), r"not empty, got \(1, 0, 4, 8\)"),
    (lambda: _expansion(_0(1, 3, 4, 9)), "x must have 8 features, got 9"),
    (lambda: _expansion(_0(1, 3, 4, 8), 15), "16 channels or more, got 15"),
    (lambda: _response(_0(1, 3, 3, 4), X), r"x must be \(1, 3, 3, 5\), got \(1, 3"),
    (lambda: _response(_0(3, 3, 5), X), r"x must be \(images, .* 5\), got \(3, 3, 5\)"),
    (lambda: _response(_0(1, 3, 3, 5), _0(1, 2, 3, 5)), r"shortcut must be \(1, 3, 3, 5\)"),
    (lambda: _call("kan_layer", x=_0(2, 5)), r"x must be \(\.\.\., 21\).*got \(2, 5\)"),
    (lambda: _call("kan_layer", weight=_0(16)), "weight is not packed for 19 outputs of 21 inputs"),
    # Maps and norms.
    (lambda: _call("nchw_from_nhwc", affine=_0(2, 7)), r"affine must be \(2, 75\), got \(2, 7\)"),
    (lambda: _call("nchw_from_nhwc", x=_0(8, 3, 4)), r"x must be \(batch, channels, height"),
    (lambda: _call("window_means", x=_0(2, 3)), r"x must be \(batch, height, width, "),
    (lambda: _call("window_pool", x=_0(2, 3)), r"x must be \(batch, height, width, "),
    (lambda: _call("window_pool", size=(11, 11)), r"must contain a pixel.*got 11 windows of 3"),
    (lambda: _call("window_pool", padding=(1, 5)), r"a pixel.*padding 5 and 31 pixels"),
    (lambda: _call("window_means", window_size=(0, 1)), r"must not be empty, got \(0, 1\)"),
    (lambda: _call("window_means", x=_0(1, 0, 2, 3)), r"must not be empty.*\(1, 0, 2, 3\)"),
    (lambda: _call("biased_softmax", x=_0(2, 0, 4), bias=_0(0, 4)), "x must not be empty"),
    (lambda: _call("na_cpu_dynamic_mix", query=_0(3, 2, 9, 21)), r"156, 21\), got \(3, 2, 9, 21\)"),
    (lambda: _call("na_cpu_dynamic_mix", key=_0(3, 1, 21, 9)), r"21, 9\), got \(3, 1, 21, 9\)"),
    (lambda: _call("na_cpu_dynamic_mix", kernel_sizes=(3, 13)), "a 13×13 kernel does not fit"),
    (lambda: _call("na_cpu_dynamic_mix", weights=[_0(9, 9), _0(8, 16)]), r"\(9, 16\), got \(8"),
    (lambda: _call("response_scales", x=_0(2, 3, 4)), r"must be \(batch, height, width, dim"),
    (lambda: _call("response_scales", x=_0(2, 0, 4, 45)), "not be empty"),
    # Scans.
    (lambda: _call("mixed_scan", projected=_0(2, 50, 36)), "108 channels or more"),
    (lambda: _call("mixed_scan", decay=_0(2, 50, 108)), r"decay must be \(2, 50, 36\)"),
    (lambda: _call("mixed_scan", norm=_0(36)), r"norm must be \(18,\), got \(36,\)"),
    (lambda: _call("bi_wkv_forward", segments=-1), "got -1"),
    (lambda: _call("shifted_mixtures", x=_0(15, 14, 40)), r"\(15, 14, 40\)"),
    (lambda: _call("shifted_mixtures", shares=_0(4, 40)), "got 4"),
    (lambda: _call("shifted_mixtures", shares=_0(0, 40)), "got 0"),
    (lambda: _call("shifted_mixtures", groups=3), "groups 3"),
]  # fmt: skip
INT8 = "packed_linear_int8"
IN_INT8: list[Case] = [
    (lambda: pack_int8_weight(_0(3)), "weight must be .out_features, in_features ≤ 65536., got"),
    (lambda: pack_int8_weight(_0(1, LARGEST_INPUT + 1)), "in_features ≤ 65536., got"),
    (lambda: _call(INT8, x=_0(2, 90, 99)), "got .2, 90, 99."),
    (lambda: _call(INT8, weight=_0(2048)), "weight_scale and in_range are for weights in int8"),
    (lambda: _call(INT8, weight_scale=None), r"weight_scale must be .2, 43., got None"),
    (lambda: _call(INT8, weight_scale=_0(43)), r"weight_scale must be .2, 43., got .43,."),
    (lambda: _call(INT8, in_range=_0(3)), r"in_range must be .2,., got .3,."),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_refused(call: Callable[[], object], message: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(INT8 not in CALLS, reason="this CPU has no int8 instructions")
@pytest.mark.parametrize(("call", "message"), IN_INT8)
def test_refused_in_int8(call: Callable[[], object], message: str) -> None:
    assert int8_unavailable(torch.device("cpu"), torch.float32) is None
    pack_int8_weight(_0(1, LARGEST_INPUT))
    with pytest.raises(ValueError, match=message):
        call()


def test_depthwise_convolutions_that_torch_computes() -> None:
    cpu = torch.device("cpu")
    assert unavailable((1, 1), cpu, torch.float32) is None
    assert "cuda" in unavailable((1, 1), torch.device("cuda"), torch.float32)
    assert "strides" in unavailable((3, 3), cpu, torch.float32)
