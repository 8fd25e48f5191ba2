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
from torch import Tensor, nn

from ops.cpu.attention.grouped import attend
from ops.inference.conversion import to_channels_last
from ops.inference.layers import convert
from ops.replay.graph import NotCapturableError
from ops.replay.module import recorded_form
from ops.rewriting.graph import OperatorGraph, Program
from ops.rewriting.module import Rewritten
from ops.rewriting.recorder import record
from ops.rewriting.rewrite import rewrite


class _Call(nn.Module):
    """A module of layers whose forward is a function of them and of the input."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias)
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _graph(model: nn.Module, x: Tensor) -> OperatorGraph:
    torch.manual_seed(0)
    graph = record(model.eval(), model, x)
    rewrite(graph)
    return graph


def _names(graph: OperatorGraph) -> list[str]:
    """The operators that compute something."""
    views = ("permute", "reshape", "transpose", "flatten", "view", "unbind", "select")
    names = [operator.name.removeprefix("aten.").partition(".")[0] for operator in graph.operators]
    return [name for name in names if name not in views]


def _check(model: nn.Module, x: Tensor, *expected: str) -> OperatorGraph:
    """Assert which operators are left, and that they compute what the model does."""
    graph = _graph(model, x)
    assert _names(graph) == list(expected), str(graph)
    program = Program(graph)
    for image in (x, torch.randn_like(x)):
        with torch.no_grad():
            torch.testing.assert_close(program(image), model(image), rtol=1e-5, atol=1e-5)
    return graph


IMAGE = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(0))
TOKENS = IMAGE.flatten(2).transpose(1, 2).contiguous()


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


SQUARE, WIDE = (16, 16), {"fc1": (16, 40), "fc2": (40, 16)}
ONE, TWO = ["FastLinear"], ["FastLinear"] * 2
# By what is shown: a function of layers and an input, the layers, the input, and what is left.
RULES: dict[str, tuple[Callable[..., Any], dict[str, Any], Tensor, list[str]]] = {
    "norm and activation become part of a convolution": (
        lambda m, x: F.relu(m.norm(m.conv(x)), inplace=True),
        {"conv": nn.Conv2d(16, 24, 3, 2, 1, bias=False), **_norms(norm=24)},
        *(IMAGE, ["FastConv2d"]),
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
    "a norm of vectors before a linear layer": (
        lambda m, x: F.relu(m.fc(m.norm(x.mean((2, 3))))),
        {"norm": nn.BatchNorm1d(16), **_linear(fc=(16, 9))},
        *(IMAGE, ["FastGlobalAvgPool2d", "FastLinear"]),
    ),
    "a norm of vectors that is read elsewhere": (
        lambda m, x: m.fc(y := m.norm(x.mean((2, 3)))) + y,
        {"norm": nn.BatchNorm1d(16), **_linear(fc=SQUARE)},
        *(IMAGE, ["FastGlobalAvgPool2d", "BatchNorm1d", "FastLinear"]),
    ),
    **{
        # By our kernel, or by oneDNN with a stride that the kernel does not take.
        f"several outputs of each channel, {stride} apart": (
            lambda m, x: F.relu(m.norm(m.conv(x))),
            {"conv": nn.Conv2d(16, 48, 7, stride, padding=3, groups=16), **_norms(norm=48)},
            *(IMAGE, ["FastMultipliedConv2d"]),
        )
        for stride in (2, 3)
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
        *(IMAGE, ["FastGlobalAvgPool2d", *["FastLinear"] * 3]),
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
        lambda m, x: m.fc(x).add(x, alpha=2), _linear(fc=SQUARE), TOKENS, ["FastLinear", "add"]
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
    "a gated map with a factor": (
        lambda m, x: x.add((y := m.conv(x)) * m.gate(y.mean((2, 3), True)).sigmoid(), alpha=2),
        _convs(conv=SQUARE, gate=SQUARE),
        *(IMAGE, ["FastLinear", "FastGlobalAvgPool2d", "FastLinear", "mul", "add"]),
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
    "multiples in another order": (
        lambda m, x: m.fc(x) + (x + 0.5 * (m.scale * x)),
        {**_linear(fc=SQUARE), **_scale()},
        *(TOKENS, ONE),
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
    "a gate from another layer": (
        lambda m, x: m.gate(x).sigmoid() * m.fc(x), _linear(gate=SQUARE, fc=SQUARE), TOKENS, TWO
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
    "empty parts of more": (
        lambda m, x: torch.cat((x, x[:, :0], x * 2), 1), {}, TOKENS, ["mul", "cat"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    function, layers, x, left = RULES[rule]
    torch.manual_seed(0)
    _check(_Call(function, **copy.deepcopy(layers)), x, *left)


def test_the_block_of_convnext_is_two_layers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x).permute(0, 2, 3, 1))
        y = m.fc2(F.gelu(m.fc1(y))).permute(0, 3, 1, 2)
        return x + y.mul(m.scale.reshape(1, -1, 1, 1))

    conv = nn.Conv2d(16, 16, 7, padding=3, groups=16)
    layers = {"fc1": nn.Linear(16, 40), "fc2": nn.Linear(40, 16), "norm": nn.LayerNorm(16)}
    model = _Call(forward, conv=conv, **layers)
    model.scale = nn.Parameter(torch.randn(16))
    _check(model, IMAGE, "FastDepthwiseConv2d", "FeedForward")


@pytest.mark.parametrize("stride", [1, 2])
def test_an_expansion_with_squeeze_and_excitation_is_one_layer(stride: int) -> None:
    """https://arxiv.org/abs/1905.02244"""

    def block(m: Any, x: Tensor) -> Tensor:
        hidden = F.hardswish(m.bn2(m.dw(F.hardswish(m.bn1(m.pw(x))))))
        gates = F.hardsigmoid(m.excite(F.relu(m.squeeze(hidden.mean((2, 3), keepdim=True)))))
        out: Tensor = m.out(hidden * gates)
        return out

    parts = {"pw": nn.Conv2d(6, 24, 1), "dw": nn.Conv2d(24, 24, 5, stride, 2, groups=24)}
    gates = {"squeeze": nn.Conv2d(24, 8, 1), "excite": nn.Conv2d(8, 24, 1)}
    norms = {"bn1": nn.BatchNorm2d(24), "bn2": nn.BatchNorm2d(24)}
    model = _Call(block, **parts, **gates, **norms, out=nn.Conv2d(24, 6, 1))
    _check(model, torch.randn(2, 6, 9, 7), "Expansion", *["FastLinear"] * 3)


def test_an_expansion_read_before_the_convolution_stays() -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        hidden = m.pw(x)
        out: Tensor = m.dw(hidden)
        return out * out.mean((2, 3), keepdim=True) + hidden

    layers = {"pw": nn.Conv2d(6, 24, 1), "dw": nn.Conv2d(24, 24, 3, padding=1, groups=24)}
    graph = _graph(_Call(block, **layers), torch.randn(2, 6, 9, 7))
    assert "Expansion" not in _names(graph)


def test_attention_is_one_operator_without_copies() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return m.proj(y.transpose(1, 2).reshape(x.shape)) + x

    model = _Call(forward, qkv=nn.Linear(16, 48), proj=nn.Linear(16, 16))
    _check(model, TOKENS, "FastLinear", "Attention", "FastLinear")


def test_a_response_norm_takes_no_pass_of_its_own() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.gelu(m.fc1(x.permute(0, 2, 3, 1)))
        norm = y.norm(p=2, dim=(1, 2), keepdim=True)
        share = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        y = y + torch.addcmul(m.bias, m.weight, y * share)
        return x + m.fc2(y).permute(0, 3, 1, 2)

    model = _Call(forward, fc1=nn.Linear(16, 40), fc2=nn.Linear(40, 16))
    model.weight, model.bias = (nn.Parameter(torch.randn(40)) for _ in range(2))
    _check(model, IMAGE, "ResponseFeedForward")


def test_scales_of_a_response_norm_take_one_pass() -> None:
    """Between other layers than two linear ones, as in OverLoCK."""

    def forward(m: Any, x: Tensor, eps: float = 1e-6) -> Tensor:
        y = m.conv(x)
        norm = y.norm(p=2, dim=(2, 3), keepdim=True)
        return m.fc(y * (1 + m.weight * (norm / (norm.mean(dim=1, keepdim=True) + eps))))

    model = _Call(forward, conv=nn.Conv2d(16, 16, 3, padding=1, groups=16), fc=nn.Conv2d(16, 8, 1))
    model.weight = nn.Parameter(torch.randn(1, 16, 1, 1))
    _check(model, IMAGE, "FastDepthwiseConv2d", "ResponseScales", "FastLinear")
    model.function = lambda m, x: 2 + m.weight * x.norm(p=2, dim=(2, 3), keepdim=True)
    assert "ResponseScales" not in _names(_graph(model, IMAGE))


def test_a_scaled_shortcut_is_added_by_the_linear_layer() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        shift, scale = (t.view(-1, 1, 1) for t in (m.shift, m.scale))
        return torch.addcmul(shift, x, scale) + m.fc(x)

    model = _Call(forward, fc=nn.Conv2d(16, 16, 1))
    model.shift, model.scale = (nn.Parameter(torch.randn(16)) for _ in range(2))
    _check(model, IMAGE, "FastLinear")
    square = torch.randn(2, 16, 16, 16)
    _check(model, square, "FastLinear")
    model.function = lambda m, x: torch.addcmul(m.shift, x, m.scale) + m.fc(x)  # of the columns
    _check(model, square, "addcmul", "FastLinear")


def test_pooling_of_windows_and_products_with_a_constant_are_layers() -> None:
    model = _Call(lambda m, x: torch.nn.functional.adaptive_avg_pool2d(x, (3, 7)) @ m.weight)
    model.weight = nn.Parameter(torch.randn(7, 5))
    _check(model, IMAGE, "FastAdaptiveAvgPool2d", "FastLinear")
    model.function = lambda m, x: torch.nn.functional.adaptive_avg_pool2d(x, (2, 7)) @ m.weight
    _check(model, IMAGE, "adaptive_avg_pool2d", "FastLinear")


def test_products_are_not_stored_before_a_softmax_with_a_table() -> None:
    """Of all keys, and of parts of them, of which one is also used without a softmax."""

    def forward(m: Any, x: Tensor) -> Any:
        products = x.transpose(-2, -1) @ x.sin()
        parts = products.split([3, 4], dim=-1) if m.split else [products]
        tables = (m.table[..., :3], m.table[..., 3:]) if m.split else [m.table]
        found = [(p.unflatten(2, (1, 7)) + t[:, None]) for p, t in zip(parts, tables, strict=True)]
        return [p.softmax(-1) for p in found[: m.softmaxes]] + found[m.softmaxes :]

    model = _Call(forward)
    model.table = nn.Parameter(torch.randn(16, 7, 7))
    model.split, model.softmaxes = False, 1
    _check(model, IMAGE, "sin", "AttentionWeights")
    model.split, model.softmaxes = True, 2
    _check(model, IMAGE, "sin", "slice", "AttentionWeights", "slice", "AttentionWeights")
    model.softmaxes = 1
    names = _names(_graph(model, IMAGE))
    assert "matmul" in names and "AttentionWeights" not in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_is_added_by_the_softmax(dtype: torch.dtype) -> None:
    model = _Call(lambda m, x: (x + m.table).softmax(dim=-1).to(dtype))
    model.table = nn.Parameter(torch.randn(16, 9, 7))
    _check(model, IMAGE, "BiasedSoftmax")
    model.function = lambda m, x: (x + m.table).softmax(dim=-2)
    _check(model, IMAGE, "add", "softmax")
    model.table = nn.Parameter(torch.randn(7))
    model.function = lambda m, x: (x + m.table).softmax(dim=-1)
    _check(model, IMAGE, "add", "softmax")


def test_several_results_and_other_values_are_returned() -> None:
    model = _Call(lambda m, x: {"maps": [m.conv(x), x * 2], "size": 3}, conv=nn.Conv2d(16, 8, 1))
    result = Program(_graph(model, IMAGE))(IMAGE)
    assert result["size"] == 3 and torch.equal(result["maps"][1], IMAGE * 2)
    with torch.no_grad():
        torch.testing.assert_close(result["maps"][0], model(IMAGE)["maps"][0])


def test_what_depends_on_weights_only_is_computed_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.conv.weight
        mask = torch.zeros(9, 7)
        mask[2:, 3:] = 1
        return F.conv2d(x * mask, weight / weight.std((1, 2, 3), keepdim=True))

    _check(_Call(forward, conv=nn.Conv2d(16, 8, 3)), IMAGE, "mul", "FastConv2d")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x if x.sum() > 0 else -x,
        lambda m, x: x[x > 0],
        lambda m, x: x.mul_(2),
        lambda m, x: m.fc.weight.mul_(1).sum() + x,
        lambda m, x: (y := x * 2, y.view(-1).add_(1), y)[2],
        lambda m, x: 3,
    ],
    ids=["branch", "mask", "input", "weight", "view", "number"],
)
def test_calls_that_cannot_be_replayed_are_recognised(function: Any) -> None:
    with pytest.raises(NotCapturableError):
        record(model := _Call(function, fc=nn.Linear(16, 16)), model, TOKENS.clone())


def test_an_operator_in_place_changes_no_other_value() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        z = y.clone()
        z += 1
        y.relu_()
        return y * z

    _check(_Call(forward, fc=nn.Linear(16, 16)), TOKENS, "FastLinear", "add", "relu", "mul")


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
        st.tuples(
            st.sampled_from([*_UNARY, *_LAYERS, *_BINARY]), st.integers(0, 9), st.integers(0, 9)
        ),
        min_size=1,
        max_size=14,
    ),
    st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_random_graphs_compute_the_same(steps: list[tuple[str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    layers = {f"layer{i}": _LAYERS[s]() for i, (s, _, _) in enumerate(steps) if s in _LAYERS}

    def forward(m: Any, x: Tensor) -> Tensor:
        values = [x]
        for i, (step, a, b) in enumerate(steps):
            first, second = values[a % len(values)], values[b % len(values)]
            if step in _LAYERS:
                values.append(getattr(m, f"layer{i}")(first))
            else:
                values.append(
                    _UNARY[step](first) if step in _UNARY else _BINARY[step](first, second)
                )
            values[-1] = values[-1] / values[-1].detach().abs().amax().clamp(min=1)
        return values[-1] + values[len(values) // 2]

    model = _Call(forward, **layers).eval()
    program = Program(_graph(model, IMAGE))
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact, plain = double(IMAGE.double()), model(IMAGE)
        error = (program(IMAGE) - exact).abs().max()
        bound = max(1e-5, 4 * (plain - exact).abs().max().item()) * exact.abs().max().clamp(min=1)
    assert error <= bound, f"{steps}: {error} > {bound}"


def test_folded_weights_keep_their_dtype() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x)) * 0.17 + m.norm2(x)
        return m.fc(y.permute(0, 2, 3, 1)) * 0.3 + m.bias

    conv = nn.Conv2d(16, 16, 3, padding=1)
    norms = {"norm": nn.BatchNorm2d(16), "norm2": nn.BatchNorm2d(16)}
    model = _Call(forward, conv=conv, fc=nn.Linear(16, 16), **norms)
    model.bias = nn.Parameter(torch.randn(16))
    exact, image = copy.deepcopy(model).eval().double()(IMAGE.double()), IMAGE.bfloat16()
    graph = _graph(model.bfloat16(), image)
    assert _names(graph) == ["FastConv2d", "FastLinear"], str(graph)
    error = (Program(graph)(image) - exact).abs().max() / exact.abs().max()
    assert error < 0.02


# -- shortcuts and gates -------------------------------------------------------------------------
def test_a_gated_branch_is_added_in_one_pass() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        gates = torch.sigmoid(m.se(y.mean((2, 3), keepdim=True)))
        return x + 0.1 * (y * gates).permute(0, 1, 2, 3)

    model = _Call(forward, conv=nn.Conv2d(16, 16, 3, padding=1), se=nn.Conv2d(16, 16, 1))
    _check(model, IMAGE, "FastConv2d", "FastGlobalAvgPool2d", "FastLinear", "mul", "addcmul")


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_and_shortcut_are_an_epilogue(dtype: torch.dtype, clips: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        row = y.mean((2, 3))[:, None].float()
        gates = F.conv1d(row, m.weight.float(), padding=2)[:, 0, :, None, None].sigmoid()
        out = x + y * gates.to(x.dtype)
        return F.relu(out) if clips else out

    model = _Call(forward, conv=nn.Conv2d(16, 16, 1))
    model.weight = nn.Parameter(torch.randn(1, 1, 5))
    exact, image = copy.deepcopy(model).eval().double(), IMAGE.to(dtype)
    graph = _graph(model.to(dtype), image)
    assert _names(graph) == ["GatedLinear"], str(graph)
    program = Program(graph)
    for x in (image, torch.randn_like(image)):
        with torch.no_grad():
            difference = program(x) - exact(x.double())
        assert difference.abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


def test_gates_of_a_map_that_is_read_elsewhere_stay() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        gates = F.conv1d(y.mean((2, 3)).unsqueeze(1), m.weight, padding=1).sigmoid()
        return x + y * gates.view(2, 16, 1, 1), y.amax()

    model = _Call(forward, conv=nn.Conv2d(16, 16, 1))
    model.weight = nn.Parameter(torch.randn(1, 1, 3))
    left = ["FastLinear", "FastGlobalAvgPool2d", "ChannelGates", "addcmul", "amax"]
    _check(model, IMAGE, *left)


@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_of_another_length_makes_no_gates(padding: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        row = x.mean((2, 3)).unsqueeze(1)
        return x * F.conv1d(row, m.weight, None, 1, padding, 1 + padding).sigmoid().mean()

    model = _Call(forward)
    model.weight = nn.Parameter(torch.randn(1, 1, 3))
    assert "ChannelGates" not in _names(_graph(model, IMAGE))


@pytest.mark.parametrize("squeezes", [True, False])
def test_the_block_of_unireplknet_is_two_layers(squeezes: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        if squeezes:
            y = y * torch.sigmoid(m.excite(F.relu(m.squeeze(y.mean((2, 3), keepdim=True)))))
        y = F.gelu(m.fc1(y.permute(0, 2, 3, 1)))
        norm = y.norm(dim=(1, 2), keepdim=True)
        y = y * (m.response * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + 1)
        return x + m.fc2(y).permute(0, 3, 1, 2)

    layers = {"squeeze": nn.Conv2d(16, 4, 1), "excite": nn.Conv2d(4, 16, 1)}
    layers |= {"conv": nn.Conv2d(16, 16, 3, padding=1, groups=16)}
    model = _Call(forward, fc1=nn.Linear(16, 40), fc2=nn.Linear(40, 16), **layers)
    model.response = nn.Parameter(torch.randn(1, 1, 1, 40))
    last = "SqueezedResponseFeedForward" if squeezes else "ResponseFeedForward"
    _check(model, IMAGE, "FastDepthwiseConv2d", last)


# -- networks whose layers have their forms already ----------------------------------------------
def test_kernels_that_write_to_parts_of_a_map() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        heads = m.fc(x).unflatten(2, (4, 4))
        out = torch.empty_like(x)
        for half, part in zip(heads.chunk(2, 2), out.unflatten(2, (4, 4)).chunk(2, 2), strict=True):
            attend(half, half, half, part)
        return x + out

    model = _Call(forward, fc=nn.Linear(16, 16))
    names = ("unflatten", "empty_like", "chunk", "unflatten", "chunk")
    _check(model, TOKENS, "FastLinear", *names, "grouped_attention", "grouped_attention", "add")


def test_kernels_that_write_to_what_was_read_are_not_recorded() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        heads = m.fc(x).unflatten(2, (4, 4))
        before = heads + 1
        attend(heads, heads, heads, heads)
        return before + heads

    model = _Call(forward, fc=nn.Linear(16, 16))
    with pytest.raises(NotCapturableError, match="modifies an existing tensor"):
        record(model.eval(), model, TOKENS)


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
            network = convert(model, recorded_form(nn.Sequential, Rewritten))
            with ThreadPoolExecutor(4) as pool:
                for out, right in zip(pool.map(network, inputs), expected, strict=True):
                    torch.testing.assert_close(out, right)
    finally:
        sys.setswitchinterval(before)
