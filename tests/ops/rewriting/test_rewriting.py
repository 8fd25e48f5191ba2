"""Recorded and rewritten operators: the same results, and the operators that should be left."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_graphs import IMAGE, TOKENS, Call, assert_left, graph_of, names_of
from torch import Tensor, nn

from ops.cpu.attention.grouped import attend
from ops.fuse.replayed import Replayed, replayed_class
from ops.inference.conversion import to_channels_last
from ops.inference.layers import convert
from ops.neighborhood import na2d_av
from ops.reparam import norm_affine
from ops.replay.graph import NotCapturableError


def _norms(**channels: int) -> dict[str, nn.Module]:
    return {name: nn.BatchNorm2d(n) for name, n in channels.items()}


def _linear(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def _convs(side: int = 1, groups: int = 1, **sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {
        name: nn.Conv2d(*size, side, padding=side // 2, groups=groups)
        for name, size in sizes.items()
    }


def _scale(*shape: int, **dtype: Any) -> dict[str, nn.Parameter]:
    return {"scale": nn.Parameter(torch.randn(*shape or (16,), **dtype))}


def _weights(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def _share(y: Tensor, pixels: tuple[int, int], channels: int) -> Tensor:
    """Of the norms of all channels: that of a response norm."""
    norm = y.norm(p=2, dim=pixels, keepdim=True)
    return norm / (norm.mean(channels, keepdim=True) + 1e-6)


def _l1_response(m: Any, x: Tensor) -> Tensor:
    y = F.gelu(m.fc1(x))
    norm = torch.linalg.vector_norm(y, 1, dim=(1, 2), keepdim=True)
    out: Tensor = m.fc2(y * (m.weight * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + 1))
    return out


def _squeezed(m: Any, y: Tensor) -> Tensor:
    return y * m.excite(F.relu(m.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()


def _gates(m: Any, y: Tensor, dilation: int = 1) -> Tensor:
    row = y.mean((2, 3)).unsqueeze(1)
    return F.conv1d(row, m.weight, None, 1, dilation, dilation).sigmoid().view(2, 16, 1, 1)


def _expansion(m: Any, x: Tensor) -> Any:
    """https://arxiv.org/abs/1905.02244"""
    hidden = F.hardswish(m.norm2(m.dw(F.hardswish(m.norm1(m.pw(x))))))
    gates = F.hardsigmoid(m.excite(F.relu(m.squeeze(hidden.mean((2, 3), keepdim=True)))))
    return m.out(hidden * gates)


def _attention(m: Any, x: Tensor) -> Any:
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    return m.proj(y.transpose(1, 2).reshape(x.shape)) + x


def _mixes(m: Any, x: Tensor, sizes: tuple[int, ...], dilation: int = 1) -> Tensor:
    """Of windows whose weights are such softmaxes, by 4 heads."""
    heads = x.unflatten(1, (4, 4))
    query, key = heads.flatten(3).transpose(-2, -1), x.sin()[..., :1].reshape(2, 4, 4, 9)
    areas = [k * k for k in sizes]
    found, tables = (query @ (key @ m.map)).split(areas, dim=-1), m.table.split(areas, dim=-1)
    parts = [
        na2d_av((p.unflatten(2, (9, 7)) + t).softmax(-1), heads.permute(0, 1, 3, 4, 2), k, dilation)
        for p, t, k in zip(found, tables, sizes, strict=True)
    ]
    return torch.cat([part.permute(0, 2, 3, 1, 4) for part in parts], dim=3)


def _masked(m: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(9, 7)
    mask[2:, 3:] = 1
    return F.conv2d(x * mask, m.conv.weight / m.conv.weight.std((1, 2, 3), keepdim=True))


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    z = y.clone()
    z += 1
    y.relu_()
    return y * z


def _block_of_unireplknet(m: Any, x: Tensor) -> Tensor:
    y = F.gelu(m.fc1((_squeezed(m, m.conv(x)) if m.squeeze else m.conv(x)).permute(0, 2, 3, 1)))
    y = y * (m.response * _share(y, (1, 2), -1) + 1)
    return x + m.fc2(y).permute(0, 3, 1, 2)


SQUARE, WIDE = (16, 16), {"fc1": (16, 40), "fc2": (40, 16)}
CUBE = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
ONE = ["FastLinear"]
# By what is shown: a function of layers and an input, the layers, the input, and what is left.
RULES: dict[str, tuple[Callable[..., Any], dict[str, Any], Tensor, list[str]]] = {
    "norm and activation become part of a convolution": (
        lambda m, x: F.relu(m.norm(m.conv(x)), inplace=True),
        {"conv": nn.Conv2d(16, 24, 3, 2, 1, bias=False), **_norms(norm=24)},
        *(IMAGE, ["FastConv2d"]),
    ),
    "an activation stays after a sum with a multiple of another map": (
        lambda m, x: F.relu(m.fc(x) + 0.5 * x), _convs(fc=SQUARE), IMAGE, ["FastLinear", "relu"]
    ),
    "a norm whose convolution is read elsewhere stays": (
        lambda m, x: m.norm(y := m.conv(x)) * y,
        {**_convs(3, conv=SQUARE), **_norms(norm=16)},
        *(IMAGE, ["FastConv2d", "BatchNorm2d", "mul"]),
    ),
    "channels of another axis are not folded": (
        lambda m, x: m.norm(m.fc(x)),
        {**_linear(fc=(7, 16)), **_norms(norm=16)},
        *(IMAGE, ["FastLinear", "BatchNorm2d"]),
    ),
    "a scale of columns is no scale of channels": (
        lambda m, x: m.conv(x) * m.scale,
        {**_convs(3, conv=SQUARE), **_scale()},
        *(CUBE, ["FastConv2d", "mul"]),
    ),
    "a scale of another dtype is not folded": (
        lambda m, x: m.fc(x) * m.scale,
        {**_linear(fc=SQUARE), **_scale(16, dtype=torch.float64)},
        *(TOKENS, ["FastLinear", "mul"]),
    ),
    **{
        f"parallel branches of {groups} groups": (
            lambda m, x: F.gelu(m.norm3(m.three(x)) + m.norm1(m.one(x)) + m.norm0(x)),
            {
                **{**_convs(3, groups, three=SQUARE), **_convs(1, groups, one=SQUARE)},
                **_norms(norm0=16, norm1=16, norm3=16),
            },
            *(IMAGE, ["FastConv2d" if groups == 1 else "FastDepthwiseConv2d"]),
        )
        for groups in (1, 16)
    },
    **{
        # By our kernel, or by oneDNN with a stride that the kernel does not take.
        f"several outputs of each channel, {stride} apart": (
            lambda m, x: F.relu(m.norm(m.conv(x))),
            {"conv": nn.Conv2d(16, 48, 7, stride, padding=3, groups=16), **_norms(norm=48)},
            *(IMAGE, ["FastDepthwiseConv2d"]),
        )
        for stride in (2, 3, (1, 3))
    },
    "branches of another sign and the map itself": (
        lambda m, x: x + m.scale * (m.conv(x) - (m.norm(x) + 0)),
        {**_convs(3, 16, conv=SQUARE), **_norms(norm=16), **_scale(16, 1, 1)},
        *(IMAGE, ["FastDepthwiseConv2d"]),
    ),
    "a shortcut of another map is no branch": (
        lambda m, x: m.one(x) + m.two(x * 2),
        _convs(3, one=SQUARE, two=SQUARE),
        *(IMAGE, ["FastConv2d", "mul", "FastConv2d", "add"]),
    ),
    "dilated branches stay": (
        lambda m, x: m.one(x) + m.two(x),
        {name: nn.Conv2d(16, 16, 3, padding=1, dilation=2) for name in ("one", "two")},
        *(IMAGE, ["FastConv2d", "FastConv2d", "add"]),
    ),
    **{
        f"feed-forward with {act}": (
            lambda m, x: x + m.scale * m.fc2(m.act(m.fc1(m.norm(x)))),
            {**_linear(**WIDE), **_scale(), "norm": nn.LayerNorm(16), "act": act},
            *(TOKENS, ["FeedForward"]),
        )
        for act in (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardsigmoid(), nn.Tanh())
    },
    "inverted bottleneck": (
        lambda m, x: x
        + m.norm3(m.project(F.relu6(m.norm2(m.conv(F.relu6(m.norm1(m.expand(x)))))))),
        {
            **_convs(expand=(16, 48), project=(48, 16)),
            **{**_convs(5, 48, conv=(48, 48)), **_norms(norm1=48, norm2=48, norm3=16)},
        },
        *(IMAGE, ["FeedForward"]),
    ),
    "gates scale the inputs of the next layer": (
        lambda m, x: m.project(
            x * m.rise(F.silu(m.sink(x.mean((2, 3), keepdim=True)))).sigmoid()
        ),
        _convs(sink=(16, 8), rise=(8, 16), project=(16, 20)),
        *(IMAGE, ["FastAdaptiveAvgPool2d", *["FastLinear"] * 3]),
    ),
    "ReLU of a sum": (lambda m, x: F.relu(m.fc(x) + x), _linear(fc=SQUARE), TOKENS, ONE),
    "ReLU of a sum, added": (
        lambda m, x: F.relu(m.fc(x) + x) + x,
        _linear(fc=SQUARE),
        *(TOKENS, ["FastLinear", "add"]),
    ),
    "GELU of a sum": (
        lambda m, x: F.gelu(m.fc(x) + x), _linear(fc=SQUARE), TOKENS, ["FastLinear", "gelu"]
    ),
    "a sum with a factor": (
        lambda m, x: m.fc(x).add(x, alpha=2), _convs(fc=SQUARE), IMAGE, ["FastLinear", "add"]
    ),
    "a factor of the layer": (
        lambda m, x: torch.add(x, m.fc(x), alpha=-0.5), _linear(fc=SQUARE), TOKENS, [*ONE, "add"]
    ),
    "a factor of a constant": (
        lambda m, x: m.fc(x).add(m.scale, alpha=3),
        {**_linear(fc=SQUARE), **_scale()},
        *(TOKENS, [*ONE, "add"]),
    ),
    "sums with and without a factor": (
        lambda m, x: m.fc(x).add(x, alpha=2) + x, _linear(fc=SQUARE), TOKENS, [*ONE, "add", "add"]
    ),
    "a scaled shortcut after an activation": (
        lambda m, x: F.gelu(m.fc(x)) + x * m.scale,
        {**_linear(fc=SQUARE), **_scale()},
        *(TOKENS, ONE),
    ),
    "a scale and a shortcut after an activation": (
        lambda m, x: F.gelu(m.fc(x)) * m.scale + x,
        {**_linear(fc=SQUARE), **_scale()},
        *(TOKENS, [*ONE, "mul", "add"]),
    ),
    "gated halves with two activations": (
        lambda m, x: F.silu((y := F.gelu(m.fc(x)).chunk(2, -1))[0]) * y[1],
        _linear(fc=(16, 32)),
        *(TOKENS, ["FastLinear", "chunk", "silu", "mul"]),
    ),
    "padding by nothing": (
        lambda m, x: m.fc(F.pad(x, (0, 0, 0, 0))), _linear(fc=SQUARE), TOKENS, ONE
    ),
    "multiples of a shortcut are one scale": (
        lambda m, x: x + m.conv(F.gelu(m.first(x))) + x * m.scale.view(1, -1, 1, 1),
        {**_convs(3, first=SQUARE), **_convs(conv=SQUARE), **_scale()},
        *(IMAGE, ["FastConv2d", "FastLinear"]),
    ),
    "a scaled and shifted shortcut": (
        lambda m, x: torch.addcmul(m.bias, x, m.scale) + m.conv(x.sin()),
        {**_convs(conv=SQUARE), **_weights(bias=(16, 1, 1), scale=(16, 1, 1))},
        *(IMAGE, ["sin", "FastLinear"]),
    ),
    "a shifted shortcut of an activated layer": (
        lambda m, x: torch.addcmul(m.bias, x, m.scale) + F.gelu(m.conv(x.sin())),
        {**_convs(conv=SQUARE), **_weights(bias=(16, 1, 1), scale=(16, 1, 1))},
        *(IMAGE, ["addcmul", "sin", "FastLinear"]),
    ),
    "a scale of rows is no scale of channels": (
        lambda m, x: m.fc(x) + x * m.scale,
        {**_linear(fc=SQUARE), **_scale(63, 1)},
        *(TOKENS, ["mul", "FastLinear"]),
    ),
    "shortcuts of two maps": (
        lambda m, x: m.fc(x) + x + F.relu(x),
        _linear(fc=SQUARE),
        *(TOKENS, ["FastLinear", "relu", "add"]),
    ),
    "gated halves are two layers": (
        lambda m, x: x + m.fc2(F.silu((y := m.fc1(x).chunk(2, -1))[0]) * y[1]),
        _linear(fc1=(16, 48), fc2=(24, 16)),
        *(TOKENS, ["FastLinear"] * 3),
    ),
    "swapped gated halves": (
        lambda m, x: x + m.fc2((y := m.fc1(x).chunk(2, -1))[0] * F.silu(y[1])),
        _linear(fc1=(16, 48), fc2=(24, 16)),
        *(TOKENS, ["FastLinear"] * 3),
    ),
    "halves of another axis stay together": (
        lambda m, x: F.silu((y := m.fc(x).chunk(2, 0))[0]) * y[1],
        _linear(fc=(16, 48)),
        *(TOKENS, ["FastLinear", "chunk", "silu", "mul"]),
    ),
    "squared ReLU": (
        lambda m, x: m.fc2(F.relu(m.fc1(x)) ** 2), _linear(**WIDE), TOKENS, ["FeedForward"]
    ),
    "square of ReLU": (
        lambda m, x: m.fc2(F.relu(m.fc1(x)).square()), _linear(**WIDE), TOKENS, ["FeedForward"]
    ),
    "other powers stay": (
        lambda m, x: F.relu(m.fc(x)) ** 3, _linear(fc=SQUARE), TOKENS, ["FastLinear", "pow"]
    ),
    "empty parts are left out": (
        lambda m, x: F.relu(torch.cat((x[:, :0], x * 2), 1)), {}, TOKENS, ["mul", "relu"]
    ),
    "the block of ConvNeXt is two layers": (
        lambda m, x: x
        + m.fc2(F.gelu(m.fc1(m.norm(m.conv(x).permute(0, 2, 3, 1)))))
        .permute(0, 3, 1, 2)
        .mul(m.scale.reshape(1, -1, 1, 1)),
        {**_linear(**WIDE), **_convs(7, 16, conv=SQUARE), **_scale(), "norm": nn.LayerNorm(16)},
        *(IMAGE, ["FastDepthwiseConv2d", "FeedForward"]),
    ),
    **{
        f"the block of UniRepLKNet is two layers, {last}": (
            _block_of_unireplknet,
            {
                **{**_convs(3, 16, conv=SQUARE), **_linear(**WIDE), "squeeze": None},
                **(_convs(squeeze=(16, 4), excite=(4, 16)) if "Squeezed" in last else {}),
                **_weights(response=(1, 1, 1, 40)),
            },
            *(IMAGE, ["FastDepthwiseConv2d", last]),
        )
        for last in ("ResponseFeedForward", "SqueezedResponseFeedForward")
    },
    **{
        f"an expansion with squeeze-and-excitation, {stride} apart, is one layer": (
            _expansion,
            {
                "dw": nn.Conv2d(48, 48, 5, stride, 2, groups=48),
                **_convs(pw=(16, 48), squeeze=(48, 8), excite=(8, 48), out=(48, 6)),
                **_norms(norm1=48, norm2=48),
            },
            *(IMAGE, ["Expansion", *["FastLinear"] * 3]),
        )
        for stride in (1, 2)
    },
    "an expansion read before the convolution stays": (
        lambda m, x: (z := m.dw(y := m.pw(x))) * z.mean((2, 3), keepdim=True) + y,
        {**_convs(pw=(16, 48)), **_convs(3, 48, dw=(48, 48))},
        *(IMAGE, ["FastLinear", "FastDepthwiseConv2d", "FastAdaptiveAvgPool2d", "mul", "add"]),
    ),
    "attention is one operator without copies": (
        _attention,
        _linear(qkv=(16, 48), proj=SQUARE),
        *(TOKENS, ["FastLinear", "Attention", "FastLinear"]),
    ),
    "causal attention stays": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        *({}, CUBE, ["scaled_dot_product_attention"]),
    ),
    "a response norm takes no pass of its own": (
        lambda m, x: x
        + m.fc2(
            (y := F.gelu(m.fc1(x.permute(0, 2, 3, 1))))
            + torch.addcmul(m.bias, m.weight, y * _share(y, (1, 2), -1))
        ).permute(0, 3, 1, 2),
        {**_linear(**WIDE), **_weights(weight=(40,), bias=(40,))},
        *(IMAGE, ["ResponseFeedForward"]),
    ),
    "a response norm of an NCHW map takes no pass of its own": (
        lambda m, x: m.fc2(
            (y := F.gelu(m.fc1(x))) + torch.addcmul(m.bias, m.weight, y * _share(y, (2, 3), 1))
        ),
        {**_convs(fc1=(16, 40), fc2=(40, 16)), **_weights(weight=(40, 1, 1), bias=(40, 1, 1))},
        *(IMAGE, ["ResponseFeedForward"]),
    ),
    "scales of a response norm take one pass": (
        lambda m, x: m.fc((y := m.conv(x)) * (1 + m.scale * _share(y, (2, 3), 1))),
        {**_convs(3, 16, conv=SQUARE), **_convs(fc=(16, 8)), **_scale(1, 16, 1, 1)},
        *(IMAGE, ["FastDepthwiseConv2d", "response_scales", "FastLinear"]),
    ),
    "norms of another order are no response norm": (
        _l1_response,
        {**_linear(**WIDE), **_weights(weight=(40,))},
        *(CUBE, ["FastLinear", "linalg_vector_norm", "mean", "add", "div", "mul", "add", "mul",
                 "FastLinear"]),
    ),
    "a norm without the mean of all is no response norm": (
        lambda m, x: 2 + m.scale * x.norm(p=2, dim=(2, 3), keepdim=True),
        _scale(1, 16, 1, 1),
        *(IMAGE, ["linalg_vector_norm", "mul", "add"]),
    ),
    **{
        f"pooling of windows to {size} and products with a constant": (
            lambda m, x, size=size: F.adaptive_avg_pool2d(x, size) @ m.weight,
            _weights(weight=(7, 5)),
            *(IMAGE, [pooling, "FastLinear"]),
        )
        for size, pooling in (((3, 7), "FastAdaptiveAvgPool2d"), ((2, 7), "adaptive_avg_pool2d"))
    },
    "means in another dtype": (
        lambda m, x: x.mean((2, 3), dtype=torch.float64), {}, IMAGE, ["mean"]
    ),
    **{
        f"{pool.__name__} of {options}": (
            lambda m, x, pool=pool, options=options: pool(x, **options),
            *({}, IMAGE, [left]),
        )
        for pool, options, left in (
            (F.max_pool2d, {"kernel_size": 3, "stride": 2, "padding": 1}, "WindowPool"),
            (F.max_pool2d, {"kernel_size": 3, "stride": 2, "ceil_mode": True}, "WindowPool"),
            (F.max_pool2d, {"kernel_size": 2, "dilation": 2}, "max_pool2d"),
            (F.avg_pool2d, {"kernel_size": 2, "divisor_override": 3}, "avg_pool2d"),
        )
    },
    **{
        f"mixes of windows, dilation {dilation}": (
            lambda m, x, dilation=dilation: _mixes(m, x, (2, 3), dilation),
            _weights(table=(4, 9, 7, 13), map=(9, 13)),
            *(IMAGE, ["unflatten", "sin", "slice", *left]),
        )
        for dilation, left in (
            (1, ["na_cpu_dynamic_mix"]),
            (2, ["FastLinear", "matmul", "split_with_sizes",
                 *["unflatten", "biased_softmax", "na_cpu_mix"] * 2, "cat"]),
        )
    },
    **{
        f"a table added by the softmax, {dtype}": (
            lambda m, x, dtype=dtype: (x + m.table).softmax(dim=-1).to(dtype),
            _weights(table=(16, 9, 7)),
            *(IMAGE, ["biased_softmax"]),
        )
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        f"a table {shape} of a softmax over axis {axis} stays": (
            lambda m, x, axis=axis: (x + m.table).softmax(dim=axis),
            _weights(table=shape),
            *(IMAGE, ["add", "softmax"]),
        )
        for shape, axis in (((16, 9, 7), -2), ((7,), -1))
    },
    "what depends on weights only is computed once": (
        _masked, {"conv": nn.Conv2d(16, 8, 3)}, IMAGE, ["mul", "FastConv2d"]
    ),
    "an operator in place changes no other value": (
        _in_place, _linear(fc=SQUARE), TOKENS, ["FastLinear", "add", "relu", "mul"]
    ),
    "gates of a map that is read elsewhere stay": (
        lambda m, x: (
            x + (y := m.conv(x)) * _gates(m, y), y.amax()
        ),
        {**_convs(conv=SQUARE), **_weights(weight=(1, 1, 3))},
        *(IMAGE, ["FastLinear", "FastAdaptiveAvgPool2d", "depthwise_conv2d", "mul", "add", "amax"]),
    ),
    "a dilated convolution makes no gates": (
        lambda m, x: x * _gates(m, x, 2),
        _weights(weight=(1, 1, 3)),
        *(IMAGE, ["FastAdaptiveAvgPool2d", "unsqueeze", "conv1d", "sigmoid", "mul"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    function, layers, x, left = RULES[rule]
    torch.manual_seed(0)
    assert_left(Call(function, **copy.deepcopy(layers)), x, *left)


def test_maps_of_tokens_have_channels_last() -> None:
    """Also of a single image, of whose strides torch could not tell."""
    model = Call(
        lambda m, x: F.interpolate(m.fc(x).transpose(1, 2).reshape(1, 24, 9, 7), scale_factor=2.0),
        **_linear(fc=(16, 24)),
    )
    x, seen = TOKENS[:1], []
    graph = graph_of(model, x)
    (resize,) = (o for o in graph.operators if "upsample" in o.name)
    function = resize.function
    resize.function = lambda y, *args: (seen.append(y), function(y, *args))[-1]
    with torch.no_grad():
        torch.testing.assert_close(graph(x), [model(x)])
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_several_results_and_other_values_are_returned() -> None:
    model = Call(lambda m, x: {"maps": [m.conv(x), x * 2], "size": 3}, conv=nn.Conv2d(16, 8, 1))
    maps = graph_of(model, IMAGE)(IMAGE)
    assert torch.equal(maps[1], IMAGE * 2)
    with torch.no_grad():
        torch.testing.assert_close(maps[0], model(IMAGE)["maps"][0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x if x.sum() > 0 else -x, "is_nonzero.default gives Python a bool"),
        (lambda m, x: x * x.sum().item(), "item.default gives depends on values"),
        (lambda m, x: x[x > 0], "index.Tensor gives depends on values"),
        (lambda m, x: x + torch.rand(16), "rand.default is random"),
        (lambda m, x: x + torch.empty(16).normal_(), "normal_.default is random"),
        (lambda m, x: F.dropout(x, 0.5), "dropout.default is random"),
        (lambda m, x: x.mul_(2), "modifies the input"),
        (lambda m, x: m.fc.weight.mul_(1).sum() + x, "modifies a tensor that existed before"),
        (lambda m, x: x * x.tolist()[0][0][0], "tolist gives Python values"),
        (lambda m, x: x.new_tensor(x.numpy().sum()) + x, "numpy gives Python values"),
        (lambda m, x: (x + 1).as_strided((3,), (5,)), "depends on the layout of memory"),
        (lambda m, x: (y := x.repeat(2, 1, 1), y.expand_as(y).add_(1), y)[2], "is modified"),
        (lambda m, x: {"set": {1, 2}, "map": x + 1}, "the result holds a set"),
        (lambda m, x: 3, "no result depends on the input"),
    ],
)
def test_calls_that_cannot_be_replayed_are_recognised(function: Any, message: str) -> None:
    with pytest.raises(NotCapturableError, match=message):
        graph_of(Call(function, fc=nn.Linear(16, 16)), TOKENS.clone())


_VIEWS: dict[str, Callable[[Tensor], object]] = {
    "slice": lambda y: y[:, 1:3].mul_(2),
    "slice with a step": lambda y: y[..., 1::3].sigmoid_(),
    "select": lambda y: y[:, 0].add_(1),
    "transpose": lambda y: y.transpose(1, 2).add_(y.mT),
    "permute": lambda y: y.permute(2, 0, 1)[3].zero_(),
    "reshape": lambda y: y.view(2, -1)[:, :5].fill_(7),
    "unflatten": lambda y: y.unflatten(2, (4, 4))[..., 2, :].neg_(),
    "split": lambda y: y.split((5, 11), dim=2)[1].exp_(),
    "chunk": lambda y: y.chunk(4, 2)[2].mul_(y[..., :4]),
    "unbind": lambda y: y.unbind(0)[1].add_(3),
    "narrow": lambda y: y.narrow(2, 3, 4).clamp_(0),
    "diagonal": lambda y: y[0].diagonal().fill_(1),
    "assignment": lambda y: y.__setitem__((slice(None), 1), y[:, 0] * 2),
    "several": lambda y: (y[:, :2].add_(1), y[:, 1:].mul_(2), y.squeeze(0).relu_()),
}


@pytest.mark.parametrize("view", _VIEWS)
def test_views_modified_in_place(view: str) -> None:
    """The whole changes, other views of it too, and what was read before does not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        before, row = y + 1, y[0, 2]
        _VIEWS[view](y)
        return torch.stack((before, y)).sum(0) + row * 3

    model = Call(forward, fc=nn.Linear(16, 16))
    graph = graph_of(model, TOKENS)
    for x in (TOKENS, torch.randn_like(TOKENS)):
        with torch.no_grad():
            torch.testing.assert_close(graph(x)[0], model(x))


def test_constants_that_are_written_to() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        mask = x.new_zeros(16)
        mask[:4] = 1
        before = x * mask
        mask[8:] = 2
        out = torch.zeros(2, 63, 16)
        out[:, 1:] = x[:, 1:]
        out[0] += mask
        return m.fc(before) + out

    model = Call(forward, fc=nn.Linear(16, 16))
    graph = graph_of(model, TOKENS)
    for x in (TOKENS, torch.randn_like(TOKENS)):
        with torch.no_grad():
            torch.testing.assert_close(graph(x)[0], model(x))


_UNARY = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "half": lambda x: x * 0.5,
    "shift": lambda x: x + 0.25,
    "clone": lambda x: x.clone(),
    "relu_": lambda x: F.relu(x * 1.5, inplace=True),
}
_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "pointwise": lambda: nn.Conv2d(16, 16, 1),
    "dense": lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "grouped": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4),
    "norm": lambda: nn.BatchNorm2d(16),
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "gate": lambda x, y: x * y.mean((2, 3), keepdim=True),
}


@given(
    st.lists(
        st.tuples(st.sampled_from([*_UNARY, *_LAYERS, *_BINARY]), *[st.integers(0, 9)] * 2),
        min_size=1,
        max_size=14,
    ),
    st.integers(0, 3),
)
@settings(max_examples=40)
def test_random_graphs_compute_the_same(steps: list[tuple[str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    layers = {f"layer{i}": _LAYERS[s]() for i, (s, _, _) in enumerate(steps) if s in _LAYERS}

    def forward(m: Any, x: Tensor) -> Tensor:
        values = [x]
        for i, (step, a, b) in enumerate(steps):
            first, second = values[a % len(values)], values[b % len(values)]
            made = getattr(m, f"layer{i}", _UNARY.get(step))
            value = _BINARY[step](first, second) if made is None else made(first)
            values.append(value / value.detach().abs().amax().clamp(min=1))
        return values[-1] + values[len(values) // 2]

    model = Call(forward, **layers).eval()
    program = graph_of(model, IMAGE)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact, plain = double(IMAGE.double()), model(IMAGE)
        error = (program(IMAGE)[0] - exact).abs().max()
        bound = max(1e-5, 4 * (plain - exact).abs().max().item()) * exact.abs().max().clamp(min=1)
    assert error <= bound, f"{steps}: {error} > {bound}"


def test_folded_weights_keep_their_dtype() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x)) * 0.17 + m.norm2(x)
        return m.fc(y.permute(0, 2, 3, 1)) * 0.3 + m.bias

    layers = {**_convs(3, conv=SQUARE), **_linear(fc=SQUARE), **_norms(norm=16, norm2=16)}
    model = Call(forward, **layers)
    model.bias = nn.Parameter(torch.randn(16))
    exact, image = copy.deepcopy(model).eval().double()(IMAGE.double()), IMAGE.bfloat16()
    graph = graph_of(model.bfloat16(), image)
    assert names_of(graph) == ["FastConv2d", "FastLinear"], str(graph)
    error = (graph(image)[0] - exact).abs().max() / exact.abs().max()
    assert error < 0.02
    made, scale = graph.operators[0].function, norm_affine(copy.deepcopy(model.norm).double())[0]
    wanted = model.conv.weight.double() * (0.17 * scale[:, None, None, None])
    off = (made.weight.double() - wanted).sum((2, 3)) * (1 - torch.eye(16))  # norm2 is on the rest
    assert (off.abs() <= torch.finfo(torch.bfloat16).eps * wanted.abs().amax((2, 3))).all()


# -- shortcuts and gates -------------------------------------------------------------------------
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_and_shortcut_are_an_epilogue(dtype: torch.dtype, clips: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        row = y.mean((2, 3))[:, None].float()
        gates = F.conv1d(row, m.weight.float(), padding=2)[:, 0, :, None, None].sigmoid()
        out = x + y * gates.to(x.dtype)
        return F.relu(out) if clips else out

    model = Call(forward, conv=nn.Conv2d(16, 16, 1))
    model.weight = nn.Parameter(torch.randn(1, 1, 5))
    exact, image = copy.deepcopy(model).eval().double(), IMAGE.to(dtype)
    graph = graph_of(model.to(dtype), image)
    names = ["FastAdaptiveAvgPool2d", "FastLinear", "depthwise_conv2d", "GatedLinear"]
    assert names_of(graph) == names, str(graph)
    for x in (image, torch.randn_like(image)):
        with torch.no_grad():
            difference = graph(x)[0] - exact(x.double())
        assert difference.abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


# -- networks whose layers have their forms already ----------------------------------------------
def test_kernels_that_write_to_parts_of_a_map() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        heads = m.fc(x).unflatten(2, (4, 4))
        out = torch.empty_like(x)
        for half, part in zip(heads.chunk(2, 2), out.unflatten(2, (4, 4)).chunk(2, 2), strict=True):
            attend(half, half, half, part)
        return x + out

    model = Call(forward, fc=nn.Linear(16, 16))
    names = ("unflatten", "empty_like", "chunk", "unflatten", "chunk")
    assert_left(
        model, TOKENS, "FastLinear", *names, "grouped_attention", "grouped_attention", "add"
    )


def test_kernels_that_write_to_what_was_read_are_not_recorded() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        heads = m.fc(x).unflatten(2, (4, 4))
        before = heads + 1
        attend(heads, heads, heads, heads)
        return before + heads

    model = Call(forward, fc=nn.Linear(16, 16))
    with pytest.raises(NotCapturableError, match="modifies a tensor that existed before"):
        graph_of(model, TOKENS)


# ---- networks whose calls are recorded -----------------------------------------------------------
class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.tanh(self.first(x)) * 2)


def test_threads_may_record_at_once() -> None:
    """Also layers that have their inference form, which each recording sees as one operator."""
    plain, before = _Network().eval(), sys.getswitchinterval()
    inputs = [torch.randn(2, 3 + i % 4, 16) for i in range(24)]
    expected = [plain(x).detach() for x in inputs]
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            model = nn.Sequential(_Network()).eval()
            to_channels_last(model, always=True)
            network = convert(model, replayed_class(nn.Sequential, Replayed))
            with ThreadPoolExecutor(4) as pool:
                for out, right in zip(pool.map(network, inputs), expected, strict=True):
                    torch.testing.assert_close(out, right)
    finally:
        sys.setswitchinterval(before)
