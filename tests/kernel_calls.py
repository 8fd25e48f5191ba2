"""A call of each kernel of ``ops.cpu``, for the laws that hold for all of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from compiled_kernels import conv_row, random
from torch import Tensor, nn

import ops.cpu
from ops.cpu.attention.cascaded import PackedCascadedAttention, cascaded_attention
from ops.cpu.attention.gated import gated_attention, rank_augmented_attention
from ops.cpu.call.binding import Kernel, observed_by
from ops.cpu.deformable.deformable_conv import deformable_conv2d, pack_taps
from ops.cpu.depthwise.conv import depthwise_branches, depthwise_conv2d
from ops.cpu.direct.direct_conv import DirectConv2d, direct_conv2d
from ops.cpu.feed_forward.depthwise_mlp import (
    PackedDepthwiseMlp,
    PackedExpansion,
    depthwise_expansion,
    depthwise_mlp,
)
from ops.cpu.feed_forward.kan import kan_layer
from ops.cpu.feed_forward.response_mlp import PackedResponseMlp, response_mlp
from ops.cpu.gemm.convolution import PackedConv2d, packed_conv2d
from ops.cpu.gemm.int8 import int8_unavailable, pack_int8_weight
from ops.cpu.gemm.linear import pack_weight, packed_linear, packed_linear_energy
from ops.cpu.gemm.mlp import packed_mlp
from ops.cpu.layout.nchw import nchw_from_nhwc, nhwc_from_nchw
from ops.cpu.neighborhood.attention import na_cpu_dynamic_mix
from ops.cpu.norm.layer_norm import layer_norm
from ops.cpu.norm.norms import response_scales, rms_norm
from ops.cpu.norm.softmax import biased_softmax
from ops.cpu.pooling.window_means import window_means
from ops.cpu.pooling.window_pool import window_pool
from ops.cpu.scan.gated_scan import gated_scan, gated_scan_backward, mixed_scan, normed_scan
from ops.cpu.selective.selective_scan import (
    map_scan,
    map_scan_backward,
    sequence_scan,
    sequence_scan_backward,
)
from ops.cpu.stem.packed_stem import pack_layers, packed_stem
from ops.cpu.winograd.winograd import WinogradConv2d, winograd_conv2d
from ops.cpu.wkv.wkv import bi_wkv_backward, bi_wkv_forward, shifted_mixtures
from ops.inference.attention import axis_rotations
from ops.inference.kan import pack_kan
from ops.kan import KANLayer

Arguments = dict[str, Any]


def every_kernel() -> list[Kernel]:
    """All kernels of the library."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(ops.cpu.__path__, "ops.cpu.")
    ]
    return [k for module in modules for k in vars(module).values() if isinstance(k, Kernel)]


def _f(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).float()


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _packed(out_features: int, in_features: int, seed: int = 1) -> dict[str, Tensor]:
    weight = pack_weight(_f(out_features, in_features, seed=seed))
    return {"weight": weight, "bias": _f(out_features, seed=2)}


def _int8(out_features: int, in_features: int) -> dict[str, Tensor]:
    weight, scale = pack_int8_weight(_f(out_features, in_features, seed=1))
    return {"weight": weight, "weight_scale": scale, "bias": _f(out_features, seed=2)}


def _numbered(number: int, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}{number}": tensor for name, tensor in packed.items()}


def _depthwise(side: int, stride: int, dilation: int) -> Arguments:
    return {
        **{"x": _nhwc(_f(2, 20, 37, 34)), "taps": _f(side, side, 20, seed=1), "bias": _f(20)},
        **{"stride": [stride] * 2, "padding": [dilation * (side // 2)] * 2},
        **{"dilation": [dilation] * 2, "activation": "gelu"},
    }


def _gated() -> Arguments:
    tables = [axis_rotations(size, 32, axis) for axis, size in enumerate((17, 13))]
    return {
        **{"qkvo": _f(2, 17, 13, 256), "bias": _f(2, 17, 13, 64, seed=1)},
        **{"row_table": tables[0], "column_table": tables[1], "num_heads": 2},
    }


class _Watch:
    """Takes the arguments of the last call."""

    given: Arguments

    def kernel_called(self, called: Kernel, function: Any, arguments: Any) -> None: ...

    def kernel_returned(self, called: Kernel, given: Arguments, result: Any) -> None:
        self.given = given


def _given_by(packed: Callable[..., Tensor], *arguments: Any) -> Arguments:
    """What a class that packs weights gives its kernel."""
    with observed_by(_Watch()) as watch, torch.no_grad():
        packed(*arguments)
    return watch.given


def _kan() -> Arguments:
    torch.manual_seed(0)
    layer = KANLayer(21, 19, 5, width=0.4).requires_grad_(False)
    return {"x": _f(3, 40, 21), **pack_kan(layer)._asdict()}


def _stem() -> Arguments:
    weights, biases = pack_layers(conv_row(3, 20, 40))
    activations = {"activations": ["relu", "none"], "window": [3, 2, 1]}
    return {"x": _f(2, 3, 67, 90), "weights": weights, "biases": biases, **activations}


def _cascaded() -> Arguments:
    torch.manual_seed(0)
    projections = [nn.Conv2d(21, 2 * 13 + 21, 1) for _ in range(2)]
    convs = [nn.Conv2d(13, 13, side, padding=side // 2, groups=13) for side in (3, 5)]
    packed = PackedCascadedAttention(projections, 13, convs, nn.GroupNorm(1, 42))
    return _given_by(packed, _f(6, 5, 7, 45), _f(2, 35, 35))


def _depthwise_mlp() -> Arguments:
    torch.manual_seed(0)
    conv = nn.Conv2d(140, 140, 3, padding=1, groups=140)
    packed = PackedDepthwiseMlp(nn.Linear(21, 140), conv, nn.Linear(140, 19), "silu", "gelu")
    return _given_by(packed, _f(2, 19, 22, 21), _f(2, 19, 22, 19), nn.LayerNorm(21))


def _depthwise_expansion() -> Arguments:
    torch.manual_seed(0)
    conv = nn.Conv2d(140, 140, 5, 2, padding=2, groups=140)
    return _given_by(PackedExpansion(nn.Linear(21, 140), conv, "silu", "gelu"), _f(2, 19, 22, 21))


def _winograd(channels: int, out_channels: int, groups: int) -> Arguments:
    torch.manual_seed(0)
    packed = WinogradConv2d(nn.Conv2d(channels, out_channels, 3, padding=1, groups=groups))
    return _given_by(packed, _nhwc(_f(2, channels, 19, 21)), "gelu")


def _direct() -> Arguments:
    torch.manual_seed(0)
    conv = nn.Conv2d(63, 129, 3, stride=2, padding=1, groups=3)
    return _given_by(DirectConv2d(conv.requires_grad_(False)), _nhwc(_f(2, 63, 19, 21)), "gelu")


def _response_mlp() -> Arguments:
    torch.manual_seed(0)
    convs = nn.Conv2d(21, 6, 1), nn.Conv2d(6, 21, 1)
    linears = nn.Linear(21, 140), nn.Linear(140, 21)
    packed = PackedResponseMlp(*convs, *linears, torch.randn(1, 1, 1, 140), 1e-6)
    return _given_by(packed, _f(2, 13, 12, 21), _f(2, 13, 12, 21, seed=1))


def _convolution() -> Arguments:
    torch.manual_seed(0)
    packed = PackedConv2d(nn.Conv2d(20, 40, 3, 2, 1).requires_grad_(False))
    return _given_by(packed, _nhwc(_f(2, 20, 37, 50)), "relu")


def _gla(tokens: int = 50) -> Arguments:
    query, key, gate, back = (_f(2, tokens, 3, 12, seed=s) for s in range(4))
    value = _f(2, tokens, 3, 21, seed=5)
    gates = {"log_gate": -gate.exp(), "log_gate_back": -back.exp()}
    return {"query": query, "key": key, "value": value, **gates, "scale": 0.3}


def _wkv() -> Arguments:
    key, value = _f(2, 2, 90, 45)
    decay, first = _f(2, 45, seed=1) / 90
    return {"key": key, "value": value, "decay": decay, "first": first, "segments": 8}


def _normed() -> Arguments:
    names = ("query", "key", "value", "decay")
    sequences = {n: _f(2, 50, 2, 21 if n == "value" else 10, seed=i) for i, n in enumerate(names)}
    vectors = {"decay_bias": _f(2, 10) - 1, "bonus": _f(2, 10, seed=1)}
    return {**sequences, **vectors, "weight": _f(2, 21), "bias": _f(2, 21, seed=1), "eps": 1e-3}


def _sequences() -> Arguments:
    maps = {n: _f(2, 24, 50, seed=i) for i, n in enumerate(("u", "delta"))}
    shared = {n: _f(2, 2, 3, 50, seed=i) for i, n in enumerate("BC")}
    vectors = {"D": _f(24), "delta_bias": _f(24, seed=1)}
    return {**maps, **shared, **vectors, "A": -_f(24, 3).exp(), "softplus": True}


def _map(channels: int = 20) -> Arguments:
    maps = {"x": _f(2, 6, 7, channels), "projected": _f(2, 6, 7, 4 * (3 + 2 * 2), seed=1)}
    vectors = {"D": _f(4 * channels), "delta_bias": _f(4 * channels, seed=1)}
    weight, rate = _f(4, 3, channels), -_f(4 * channels, 2).exp()
    return {**maps, "weight": weight, "A": rate, **vectors, "softplus": True}


def _mixes() -> Arguments:
    sizes = (3, 4)
    return {
        **{"query": _f(3, 2, 12 * 13, 21), "key": _f(3, 2, 21, 9, seed=1), "kernel_sizes": sizes},
        **{"weights": [_f(9, k * k, seed=k) for k in sizes]},
        **{"biases": [_f(2, 12, 13, k * k, seed=k + 2) for k in sizes]},
        **{"values": [_f(3, 2, 12, 13, 19, seed=k) for k in sizes]},
    }


def _of(kernel: Kernel, *batched: str, **given: Any) -> tuple[Kernel, tuple[str, ...], Arguments]:
    return kernel, batched, given


_Call = Callable[[], tuple[Kernel, tuple[str, ...], Arguments]]

# The kernel, the names of its tensors whose first axis are images, and its arguments, in float32.
# They are enough work for several threads, with rests of vectors.
CALLS: dict[str, _Call] = {
    "layer_norm": lambda: _of(
        *(layer_norm, "x"), x=_f(2, 30, 37, 45), weight=_f(45), bias=_f(45, seed=1), eps=1e-3,
        activation="gelu",
    ),
    "rms_norm": lambda: _of(rms_norm, "x", x=_f(2, 30, 37, 45), weight=_f(45), eps=1e-3),
    "response_scales": lambda: _of(
        response_scales, "x", x=_f(2, 30, 37, 45), weight=_f(45), eps=1e-3
    ),
    "biased_softmax": lambda: _of(
        biased_softmax, "x", x=_f(5, 3, 70, 41), bias=_f(3, 70, 41, seed=1), half=False
    ),
    "na_cpu_dynamic_mix": lambda: _of(*(na_cpu_dynamic_mix, "query", "key"), **_mixes()),
    "depthwise_conv2d": lambda: _of(depthwise_conv2d, "x", **_depthwise(7, 1, 1)),
    "depthwise_conv2d 3": lambda: _of(depthwise_conv2d, "x", **_depthwise(3, 2, 1)),
    "depthwise_conv2d 5": lambda: _of(depthwise_conv2d, "x", **_depthwise(5, 2, 1)),
    "depthwise_conv2d dilated": lambda: _of(depthwise_conv2d, "x", **_depthwise(7, 1, 3)),
    "depthwise_branches": lambda: _of(
        *(depthwise_branches, "x"), x=_nhwc(_f(2, 40, 33, 40)),
        taps=[_f(3, 3, 6), _f(1, 11, 6), _f(11, 1, 6)], biases=[_f(6, seed=s) for s in range(3)],
    ),
    "packed_linear": lambda: _of(
        *(packed_linear, "x", "other", "scale"), x=_f(2, 90, 37), **_packed(43, 37),
        activation="gelu", other=_f(2, 90, 43), combination="add_scaled", scale=_f(2, 37),
        other_scale=_f(43),
    ),
    "packed_linear few rows": lambda: _of(packed_linear, "x", x=_f(3, 601), **_packed(160, 601)),
    "packed_linear_energy": lambda: _of(
        *(packed_linear_energy, "x", "scale"), x=_f(2, 90, 37), **_packed(43, 37),
        activation="gelu", scale=_f(2, 37),
    ),
    "packed_mlp": lambda: _of(
        *(packed_mlp, "x", "residual"), x=_f(2, 90, 24), **_numbered(1, _packed(70, 24)),
        **_numbered(2, _packed(19, 70)), activation="gelu", residual=_f(2, 90, 19),
    ),
    "packed_conv2d": lambda: _of(packed_conv2d, "x", **_convolution()),
    "nchw_from_nhwc": lambda: _of(
        nchw_from_nhwc, "x", x=_nhwc(_f(2, 75, 19, 21)), affine=_f(2, 75)
    ),
    "nhwc_from_nchw": lambda: _of(
        *(nhwc_from_nchw, "nchw", "x"), nchw=_f(2, 75, 19, 21), x=_nhwc(_f(2, 75, 19, 21, seed=1))
    ),
    "window_means": lambda: _of(window_means, "x", x=_f(2, 19, 31, 75), window_size=[4, 5]),
    "window_pool": lambda: _of(
        *(window_pool, "x"), x=_f(2, 19, 31, 75), window_size=[3, 5], stride=[2, 3],
        padding=[1, 2], size=[10, 11],
    ),
    "gated_attention": lambda: _of(gated_attention, "qkvo", "bias", **_gated()),
    "rank_augmented_attention": lambda: _of(rank_augmented_attention, "qkvo", "bias", **_gated()),
    "cascaded_attention": lambda: _of(cascaded_attention, "x", **_cascaded()),
    "kan_layer": lambda: _of(kan_layer, "x", **_kan()),
    "depthwise_mlp": lambda: _of(depthwise_mlp, "x", "residual", **_depthwise_mlp()),
    "depthwise_expansion": lambda: _of(depthwise_expansion, "x", **_depthwise_expansion()),
    "winograd_conv2d": lambda: _of(winograd_conv2d, "x", **_winograd(37, 43, 1)),
    "winograd_conv2d groups": lambda: _of(winograd_conv2d, "x", **_winograd(63, 129, 3)),
    "direct_conv2d": lambda: _of(direct_conv2d, "x", **_direct()),
    "response_mlp": lambda: _of(response_mlp, "x", "shortcut", **_response_mlp()),
    "deformable_conv2d": lambda: _of(
        *(deformable_conv2d, "x", "offset"), x=_f(2, 21, 19, 32), offset=2 * _f(2, 8, 9, 16),
        weight=pack_taps(_f(19, 21, 2, 2)), bias=_f(19), kernel_size=2, stride=2,
        activation="gelu",
    ),
    "packed_stem": lambda: _of(packed_stem, "x", **_stem()),
    "shifted_mixtures": lambda: _of(
        shifted_mixtures, "x", x=_f(2, 15, 14, 40), shares=_f(3, 40), groups=1
    ),
    "bi_wkv_forward": lambda: _of(
        bi_wkv_forward, "key", "value", "gate", **_wkv(), gate=_f(2, 90, 45)
    ),
    "bi_wkv_backward": lambda: _of(
        bi_wkv_backward, "grad_out", "key", "value", grad_out=_f(2, 90, 45, seed=3), **_wkv()
    ),
    "gated_scan": lambda: _of(
        *(gated_scan, "query", "key", "value", "log_gate", "log_gate_back"), **_gla(),
        bonus=_f(3, 12),
    ),
    "gated_scan_backward": lambda: _of(
        *(gated_scan_backward, "grad_out", "query", "key", "value", "log_gate", "log_gate_back"),
        grad_out=_f(2, 50, 3, 21, seed=9), **_gla(), apart=True,
    ),
    "mixed_scan": lambda: _of(
        *(mixed_scan, "projected", "decay", "local"), projected=_f(2, 50, 113),
        decay=20 * _f(2, 50, 36, seed=1), local=_f(2, 50, 36, seed=2), norm=_f(18),
        local_norm=_f(18, seed=1), num_heads=2, eps=1e-6, activation="silu",
    ),
    "normed_scan": lambda: _of(normed_scan, "query", "key", "value", "decay", **_normed()),
    "sequence_scan": lambda: _of(sequence_scan, "u", "delta", "B", "C", **_sequences()),
    "sequence_scan_backward": lambda: _of(
        *(sequence_scan_backward, "grad_out", "u", "delta", "B", "C"),
        grad_out=_f(2, 24, 50, seed=9), **_sequences(),
    ),
    "map_scan": lambda: _of(map_scan, "x", "projected", **_map()),
    "map_scan_backward": lambda: _of(
        *(map_scan_backward, "grad_out", "x", "projected"), grad_out=_f(2, 6, 7, 20, seed=9),
        **_map(),
    ),
}  # fmt: skip

# Kernels that only some CPUs have.
if int8_unavailable(torch.device("cpu"), torch.float32) is None:
    CALLS |= {
        "packed_linear_int8": lambda: _of(
            *(packed_linear, "x", "other", "scale"), x=_f(2, 90, 37), **_int8(43, 37),
            in_range=torch.tensor((0.02, 120.0)), activation="relu", other=_f(2, 90, 43),
            combination="add", scale=_f(2, 37),
        ),
        "packed_linear_energy_int8": lambda: _of(
            *(packed_linear_energy, "x", "scale"), x=_f(2, 90, 37), **_int8(43, 37),
            activation="gelu", scale=_f(2, 37),
        ),
        "packed_mlp_int8": lambda: _of(
            *(packed_mlp, "x", "residual"), x=_f(2, 90, 24), **_numbered(1, _int8(70, 24)),
            **_numbered(2, _int8(19, 70)), activation="gelu", residual=_f(2, 90, 19),
        ),
    }  # fmt: skip
