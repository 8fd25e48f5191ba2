"""Calls of many sizes are recorded at three at most, and give what plain calls give at each."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import backbones
from ops.fuse import calls
from ops.fuse.expressions import Expressions
from ops.fuse.reads import SizeReads
from ops.fuse.sizes import SizedGraph

_INIT = """
m.conv, m.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
m.point, m.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
m.ln, m.fc, m.qkv = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 24)
m.pos = nn.Parameter(torch.randn(1, 8, 4, 4))
m.scales = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
m.many = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(9)])
"""

# Each step makes an h of (B, 8, H, W) from another one; x is the image.
_FREE = {
    "conv": "h = F.relu(m.norm(m.down(h)))",
    "same": "h = h + F.gelu(m.point(h))",
    "pool": "h = F.max_pool2d(h, 3, 2, 1)",
    "pool up": "h = F.avg_pool2d(h, 2, ceil_mode=True)",
    "odd pool": "h = F.max_pool2d(h, 3, 2, ceil_mode=True)",
    "gates": "h = h * m.point(h.mean((2, 3), keepdim=True)).sigmoid()",
    "pyramid": "h = h + F.adaptive_avg_pool2d(h, 3).mean((2, 3), keepdim=True)",
    "norm": "h = m.ln(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
    "chunk": "a, b = h.chunk(2, 1)\nh = torch.cat((b, a * 2), 1)",
    "every other": "h = h[:, :, ::2, 1:]",
    "up": "h = F.interpolate(h, scale_factor=2.0, mode='bilinear')",
    "like": "h = h + torch.ones_like(h) / 2",
}
_READING = {
    "positions": "h = h + F.interpolate(m.pos, size=h.shape[-2:], mode='bilinear')",
    "tokens": "B, C, H, W = h.shape\nt = m.fc(h.flatten(2).mT)\nh = h + t.mT.reshape(B, C, H, W)",
    "attend": "B, C, H, W = h.shape\n"
    "q, k, v = m.qkv(h.flatten(2).mT).reshape(B, H * W, 3, 2, 4).permute(2, 0, 3, 1, 4)\n"
    "h = F.scaled_dot_product_attention(q, k, v).mT.reshape(B, C, H, W)",
    "pad": "h = F.pad(h, (0, -h.shape[3] % 4, 0, -h.shape[2] % 4))",
    "crop": "h = h[:, :, : max(1, h.shape[2] // 2 * 2), : max(1, h.shape[3] // 3 * 3)]",
    "windows": "H, W = h.shape[2:]\n"
    "h = F.pad(h, (0, -W % 3, 0, -H % 3))\n"
    "w = h.unfold(2, 3, 3).unfold(3, 3, 3)\n"
    "h = (h + F.interpolate(w.mean((4, 5)), h.shape[2:]))[:, :, :H, :W]",
    "branch": "if h.shape[3] > 9:\n    h = F.avg_pool2d(h, 2, ceil_mode=True)",
    "odd branch": "h = h * 2 if h.shape[2] % 2 else h + 1",
    "loop": "for layer in m.many[: h.shape[3] // 8]:\n    h = layer(h)",
    "range": "for i in range(h.shape[2] // 5):\n    h = h * 1.5",
    "table": "h = h * m.scales[h.shape[3] // 7 % 8]",
    "dictionary": "h = h * {n: n / 8 for n in range(99)}.get(h.shape[2], 1)",
    "number": "h = h / h.shape[1] ** 0.5 * (h.shape[2] / 16)",
    "arange": "h = h + torch.arange(h.size(3)) / 8",
    "rows": "h = torch.stack([row * (i + 1) for i, row in enumerate(h.unbind(2))], 2)",
    "halves": "h = torch.cat([part * 2 for part in h.split(5, 3)], 3)",
    "length": "h = h * len(h)",
    "from values": "n = int(h.shape[2] - (h[0, 0, 0, 0] > 0).sum())\nh = h[:, :, :n]",
}
_ENDS = {
    "map": "return h",
    "vector": "return m.fc(h.mean((2, 3)))",
    "token": "return h.flatten(2).mT[:, 0]",
    "several": "return {'map': h, 'x': x, 'rows': [h[:, :, 0], h.sum(3)]}",
    "size": "return h, h.shape[2], tuple(x.shape)",
    "grid": "return h, torch.arange(h.shape[3])",
}
_STEPS = {**_FREE, **_READING}


def _check(law: Callable[..., None], steps: Sequence[str], end: str, sizes: Sequence[Any]) -> None:
    lines = [_STEPS[step] for step in steps]
    law(
        "\n".join(["h = m.conv(x)", *lines, _ENDS[end]]),
        init=_INIT,
        before="x = draw(*SIZES[i])",
        mode="torch.inference_mode()",
        calls=len(sizes),
        raises=None,
        names={"SIZES": [(b, 3, h, w) for b, h, w in sizes]},
    )


# Some come back; at the end, there are those that few networks take.
_SIZES = [
    *((1, 16, 16), (1, 16, 24), (1, 20, 32), (1, 32, 17), (1, 24, 16), (1, 15, 31), (2, 16, 24)),
    *((1, 32, 17),) * 11,
    *((3, 21, 19), (1, 48, 40), (1, 17, 25), (2, 33, 18), (1, 19, 57), (1, 64, 8), (5, 12, 13)),
    *((1, 16, 16), (1, 2, 16), (1, 16, 1), (1, 1, 1), (0, 16, 16), (1, 7, 30), (2, 1, 9)),
]


@pytest.mark.parametrize("step", [*_STEPS])
def test_each_step_at_many_sizes(step: str, law: Callable[..., None]) -> None:
    _check(law, [step], "map", _SIZES)


@pytest.mark.parametrize("end", [*_ENDS])
def test_results_at_many_sizes(end: str, law: Callable[..., None]) -> None:
    _check(law, ["conv"], end, _SIZES)


EXAMPLES = int(os.environ.get("VISION_BACKBONES_LAW_EXAMPLES", 60))
_sizes = st.tuples(st.sampled_from([1, 1, 1, 2, 3]), st.integers(1, 40), st.integers(1, 70))


@st.composite
def _programs(draw: st.DrawFn) -> tuple[list[str], str, list[Any]]:
    """More sizes than are recorded, some of which come back often enough to be captured."""
    sizes = draw(st.lists(_sizes, min_size=7, max_size=12))
    again = draw(st.lists(st.sampled_from(sizes), max_size=2))
    steps = st.lists(st.sampled_from([*_STEPS]), min_size=1, max_size=4)
    order = [*sizes, *(size for size in again for _ in range(11))]
    return draw(steps), draw(st.sampled_from([*_ENDS])), order


@pytest.mark.timeout(600 + 4 * EXAMPLES)
@fuzz(EXAMPLES)
@given(program=_programs())
def test_programs_at_many_sizes(program: Any, law: Callable[..., None]) -> None:
    _check(law, *program)


# -- what it costs -----------------------------------------------------------------------------


class Net(nn.Module):
    """A convolutional network, whose forwards are counted."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.pool, self.fc = nn.MaxPool2d(3, 2, 1), nn.Linear(32, 5)
        self.reads = reads
        self.runs = itertools.count()  # whose state is seen by none

    def forward(self, x: Tensor) -> Tensor:
        next(self.runs)
        maps = F.relu(self.conv(self.pool(F.relu(self.stem(x)))))
        if self.reads:
            maps = maps * maps.shape[3]
        return self.fc(maps.mean((2, 3)))


@torch.inference_mode()
def _call(fused: nn.Module, plain: nn.Module, *shape: int) -> None:
    x = torch.randn(*shape)
    torch.testing.assert_close(fused(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def _count(net: Any) -> int:
    """How often forward has run."""
    count: int = net.runs.__reduce__()[1][0]
    return count


def _doors(fused: Any) -> list[str]:
    return [*map(str, backbones.explain(fused).doors)]


def test_three_sizes_are_recorded() -> None:
    fused = backbones.fuse(Net())
    for width in range(32, 400, 8):
        _call(fused, Net(), 1, 3, 64, width)
    assert _count(fused) == 3
    last = _doors(fused)[-1]
    assert last.endswith("recorded (one graph of every size: Python reads no size)")
    for _ in range(10):  # captured and replayed
        _call(fused, Net(), 1, 3, 64, 392)
    assert _count(fused) == 3
    _call(fused, Net(), 1, 3, 96, 32)  # a height, of which there was but one
    _call(fused, Net(), 2, 3, 64, 32)  # and a batch
    assert _count(fused) == 5
    for batch in range(2, 6):
        for height in range(33, 99, 11):
            _call(fused, Net(), batch, 3, height, 70)
    assert _count(fused) == 5


def test_a_size_that_is_read_is_observed_if_it_comes_back() -> None:
    """Until then, calls run plainly, once each."""
    fused = backbones.fuse(Net(reads=True))
    for _ in range(12):
        for width in range(32, 96, 8):
            _call(fused, Net(reads=True), 1, 3, 64, width)
    # The first one twice, two once, and the others eight times before.
    assert _count(fused) == 2 + 2 + 5 * 9


def test_weights_may_change_between_sizes() -> None:
    plain = Net().eval()
    fused = backbones.fuse(Net())
    for number, width in enumerate(range(32, 160, 8)):
        if number in (7, 11):
            for net in (plain, fused):
                with torch.no_grad():
                    net.conv.weight.mul_(-1.5)
        _call(fused, plain, 1, 3, 64, width)
    assert 6 <= _count(fused) <= 10


def test_graphs_slower_than_plain_calls_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MEASURES", True)
    times = itertools.count()
    monkeypatch.setattr(calls, "clock", lambda: lambda: 100.0 * next(times))
    fused = backbones.fuse(Net())
    for width in range(32, 160, 8):
        _call(fused, Net(), 1, 3, 64, width)
    assert _count(fused) == 16
    assert "plain calls are faster than one graph of every size" in _doors(fused)[-1]


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_graph_that_is_wrong_leaves_each_size_alone(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = SizedGraph.__call__

    def call(graph: SizedGraph, *args: Any) -> list[Tensor]:
        if fault == "raises":
            raise KeyError("a fault")
        return [t + 1 for t in computed(graph, *args)]

    monkeypatch.setattr(SizedGraph, "__call__", call)
    fused = backbones.fuse(Net())
    for width in (32, 48, 64, 80, 96, *(112,) * 14):
        _call(fused, Net(), 1, 3, 64, width)
    found = {"raises": "a fault", "differs": "gave another result"}[fault]
    *_, before, last = _doors(fused)
    assert found in before and last == "the model, forward(1×3×64×112): recorded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_other_types_share_a_graph(dtype: torch.dtype) -> None:
    """Its results are those of a model that is fused for each size alone."""
    fused = backbones.fuse(Net(), dtype=dtype)
    for width in (32, 48, 64, 80, 96, *(112,) * 10):
        x, alone = torch.randn(1, 3, 64, width), backbones.fuse(Net(), dtype=dtype)
        for _ in range(calls.CALLS_TO_REPLAY):
            expected = alone(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-2, atol=1e-2)
    assert _count(fused) == 3


# -- expressions, and reads of sizes -----------------------------------------------------------


@fuzz(200)
@given(
    sizes=st.lists(st.integers(20, 2000), min_size=3, max_size=3, unique=True),
    other=st.integers(20, 2000),
    d=st.sampled_from([1, 2, 4, 8, 14, 16, 32]),
    side=st.sampled_from(["floor", "ceil", "missing", "product", "more"]),
)
def test_expressions_give_what_they_were_made_from(
    sizes: list[int], other: int, d: int, side: str
) -> None:
    """If sizes differ in what they leave, also elsewhere."""
    rules: dict[str, Callable[[int], int]] = {
        "floor": lambda n: n // d,
        "ceil": lambda n: -(-n // d),
        "missing": lambda n: -n % d,
        "product": lambda n: n * n * 3,
        "more": lambda n: 2 * n + 3,
    }
    rule = rules[side]
    made = Expressions([tuple(sizes), (7, 7, 7)])
    number = made.number_of(tuple(map(rule, sizes)))
    if number is None:
        assert side == "missing"
        return
    assert [made.evaluate([n, 7])[number] for n in sizes] == [*map(rule, sizes)]
    if side in ("product", "more"):
        assert made.evaluate([other, 7])[number] == rule(other)
    assert made.covers([other, 7]) and not made.covers([other, 8])
    assert not made.covers([0, 7]) and not made.covers([1, 7])


_READS = [
    (False, "x.relu() + F.gelu(x)"),
    (False, "F.layer_norm(x, (16,))"),
    (False, "F.max_pool2d(x, 2) if x.ndim == 4 and x.dim() == 4 else x"),
    (False, "F.interpolate(x, scale_factor=2.0)"),
    (False, "F.adaptive_avg_pool2d(x, 1).flatten(1)"),
    (False, "x.chunk(2, 1)[0].to(x.dtype).contiguous()"),
    (False, "x * nn.Parameter(torch.ones(16)).shape[0]"),
    (True, "x * x.shape[0]"),
    (True, "x.reshape(x.size(0), -1)"),
    (True, "x * len(x)"),
    (True, "x.view(x.numel())"),
    (True, "x.as_strided((2, 3), (x.stride(0), 1))"),
    (True, "F.adaptive_avg_pool2d(x, (None, 1))"),
    (True, "F.interpolate(x, scale_factor=2.0, recompute_scale_factor=True)"),
    (True, "F.multi_head_attention_forward(*attention(x))"),
    (True, "x * x.is_same_size(x)"),
]


def _attention(x: Tensor) -> tuple[Any, ...]:
    t = x[:, 0]
    weights = torch.ones(48, 16), torch.ones(48), None, None, False, 0.0, torch.ones(16, 16), None
    return t, t, t, 16, 2, *weights


@pytest.mark.parametrize(("found", "text"), _READS)
def test_reads_of_sizes_are_found(found: bool, text: str) -> None:
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad(), SizeReads() as reads:
        eval(text, {"x": x, "F": F, "nn": nn, "torch": torch, "attention": _attention})
    assert reads.found is found
