"""The law of ``fuse()`` on programs that hypothesis writes.

A program is data: the steps of a forward, its result, the arguments of its calls, and changes
between them. One that breaks the law is kept in ``FOUND``, as its failure shows it.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor


class Program(NamedTuple):
    """Steps are (name, number), or (word, condition, steps). What it doesn't take is global."""

    takes: str
    steps: list[Any]
    results: list[str]
    container: str
    calls: list[Call]
    changes: list[tuple[int, str]]


class Call(NamedTuple):
    mode: str
    memory: str
    second: str
    number: Any


@dataclass
class Out:
    first: Any


_EMPTY = Call("inference_mode", "no image", "own", 1)
FOUND = [
    Program("x", [("batch norm", 0)], ["h"], "RESULTS,", [_EMPTY] * 6, []),
]

# Each step makes an h of the same shape, (B, 4, 6, 6), from the last one, which is x at first. None
# multiplies rounding errors by much.
STEPS = {
    # layers
    "conv": "h = m.conv(h)",
    "pointwise": "h = m.point(h)",
    "batch norm": "h = m.norm(h)",
    "layer norm": "h = m.ln(h.tanh().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
    "linear": "h = m.fc(h)",
    "attention": "v = h.tanh().flatten(2).mT\nh = h + m.attend(v, v, v)[0].mT.reshape(h.shape)",
    "inner": "h = m.inner(h)",
    "activation": "h = m.act(h)",
    "pool": "h = F.avg_pool2d(h, 3, 1, 1)",
    # shapes and memory
    "scale": "h = h * (NUMBER + 1) / 2.5",
    "shortcut": "h = h + x",
    "roll": "h = torch.cat((h[:, NUMBER:], h[:, :NUMBER]), 1)",
    "transpose": "h = h.mT",
    "contiguous": "h = h.contiguous()",
    "channels last": "h = h.contiguous(memory_format=torch.channels_last)",
    "view": "h = h.contiguous().view(-1).view(h.shape)",
    "as_strided": "h = h.contiguous().as_strided(h.shape, (144, 36, 1, 6))",
    "stride": "h = h + h.stride(1) % 5",
    # writes
    "copy": "h = h.clone()",
    "relu in place": "h = F.relu(h, inplace=True)",
    "add in place": "h += NUMBER",
    "write a channel": "h[:, NUMBER] = 0.5",
    "write channels": "h[:, NUMBER:].mul_(2)",
    "write a view": "v = h[..., NUMBER::2]\nv.add_(1)",
    "write where": "h[x > NUMBER / 2] = 0.25",
    "write by NumPy": "h.detach().numpy()[:, NUMBER] *= 2",
    "write data": "h.data.mul_(2)",
    "write the input": "x[:, NUMBER] = 0.5",
    "add to the input": "x.add_(NUMBER)",
    "write the second": "t.mul_(0.5)",
    "keep": "kept = h",
    "keep a part": "kept = h[:, NUMBER:]",
    "keep a copy": "kept = h.clone()",
    "write what is kept": "kept.mul_(2)",
    "use what is kept": "h = h + kept.mean()",
    # state
    "count": "m.n += 1",
    "use the count": "h = h + m.n % 3",
    "previous": "h, m.old = (h + m.old) / 2, h",
    "history": "m.log = [h, *m.log[:NUMBER]]\nh = h + m.log[-1]",
    "average": "m.buf.lerp_(h.mean(), 0.5)\nh = h + m.buf",
    "average, assigned": "m.buf = (m.buf + h.mean()) / 2\nh = h + m.buf",
    "plain tensor": "m.t.mul_(0.5).add_(NUMBER)\nh = h + m.t",
    "once": "if not hasattr(m, 'once'): m.once = h.mean()\nh = h + m.once",
    "option": "h = h * m.options['k']",
    "set the option": "m.options['k'] = 1 + NUMBER / 4",
    "weight": "m.point.weight.mul_(0.9)",
    "mode": "m.norm.train(NUMBER > 1)",
    "hook": "m.conv.register_forward_hook(lambda layer, args, out: log.append(NUMBER))",
    "note": "x.note = NUMBER",
    "global": "total += NUMBER",
    "use the global": "h = h + total % 5",
    "global list": "log.append(NUMBER)",
    "use the global list": "h = h + len(log) % 3",
    # chance
    "dropout": "h = F.dropout(h, 0.25, training=True)",
    "noise": "h = h + torch.rand(1)",
    "noise, thrown away": "torch.rand(NUMBER)",
    "random": "h = h * random.random()",
    "NumPy's random": "h = h * np.random.rand()",
    # values
    "item": "h = h * (1 + x.mean().item())",
    "numpy": "h = h + float(x.detach().numpy().max())",
    "through numpy": "h = torch.from_numpy(h.detach().numpy().copy())",
    "index": "h = h + int(x.sum((0, 2, 3)).argmax())",
    "mask": "h = torch.where(x > 0, h, -h)",
    "batch": "h = h + len(x)",
    # containers and other arguments
    "parts": "h = torch.cat([*h.split(1, 1)][::-1], 1)",
    "map": "maps['NUMBER'] = h",
    "use the maps": "h = sum(maps.values(), h) / 2",
    "number": "h = h * k",
    "filled with the number": "h = h + torch.full((1,), k)",
    "second": "h = h + t",
    "the dict's": "h = h * o['k']",
    "write the dict": "o['n'] = o.get('n', 0) + NUMBER",
    "a map for the dict": "o['h'] = h",
    "write the list": "l.append(NUMBER)",
    "use the list": "h = h + len(l) % 3",
}

CONDITIONS = [
    *("x.mean() > 0", "x.sum().item() > 0", "bool(t.mean() > 0)", "x.tolist()[0][0][0][0] > 0"),
    *("m.n % 2", "m.norm.training", "hasattr(m, 'once')", "m.options['k'] > 1.4", "total % 2"),
    *("k is True", "isinstance(k, float)", "len(x) > 1", "o['k'] > 1", "len(l) % 2", "t is x"),
    *("h is x", "x.is_contiguous()", "h.is_contiguous()", "h.requires_grad"),
    *("torch.is_grad_enabled()", "torch.is_inference_mode_enabled()"),
    *("random.random() < 0.5", "torch.rand(()) < 0.5", "np.random.rand() < 0.5"),
]

# Words of steps that contain others.
BLOCKS = {
    "if": "if CONDITION:\nSTEPS",
    "if not": "if not CONDITION:\nSTEPS\nelse:\n    h = h / 2",
    "for": "for _ in range(2):\nSTEPS",
    "no_grad": "with torch.no_grad():\nSTEPS",
    "inference_mode": "with torch.inference_mode():\nSTEPS",
    "try": "try:\nSTEPS\n    if CONDITION: raise ValueError('law')\nexcept ValueError:\n    h = -h",
    "raise": "STEPS\nif CONDITION and m.n > 1: raise ValueError('law')",
}

RESULTS = [
    *("h", "h", "h", "x", "t", "kept", "h[:, 1:]", "h.mT", "h.view_as(h)", "h.clone()"),
    *("F.relu(h)", "h.detach()", "h.detach().numpy()", "h.mean().item()", "h.shape", "maps", "o"),
    *("m.n", "m.buf", "m.t", "m.point.bias", "torch.arange(3.0)", "Out(h)", "Out({'x': x.mean()})"),
    *("None", "k", "h.to_sparse()", "iter([h])", "x > 0", "[h, [x]]", "f'{x.mean():.2f}'", "log"),
]

CONTAINERS = ["RESULTS,", "[RESULTS]", "{'r': (RESULTS,)}", "Out((RESULTS,))", "(RESULTS)"]

CHANGES = [
    *("m.conv.weight.mul_(1.1)", "m.conv.weight[0, 0] = 0", "m.conv.bias = None"),
    *("m.conv.weight.data = m.conv.weight * 2", "m.point.bias += 1", "m.norm.eps += 0.5"),
    *("m.norm.train()", "m.norm.running_mean.add_(1)", "m.act = nn.ReLU()", "m.t.add_(1)"),
    *("m.options['k'] = 1.75", "total += 1", "log.append(0)", "l.append(0)", "o['k'] = 0.5"),
    *("m.point = nn.Conv2d(4, 4, 1).requires_grad_(False)", "torch.manual_seed(3)", "m.n += 1"),
    *("m.load_state_dict({k: v / 2 for k, v in m.state_dict().items()})", "m.buf = m.buf + 1"),
    *("m.conv.register_forward_hook(lambda m, args, out: log.append(len(out)))",),
    *("m.inner[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))",),
    *("m.inner.append(nn.Sigmoid())", "m.fc.weight.zero_()"),
]

_INIT = """
m.conv, m.point, m.norm = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, 0.1)
m.ln, m.fc, m.act = nn.LayerNorm(4, 0.1), nn.Linear(6, 6), nn.GELU()
m.attend = nn.MultiheadAttention(4, 2, batch_first=True)
m.inner = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
m.n, m.old, m.log, m.t, m.options = 0, 0.0, [], torch.ones(1), {'k': 1.25}
torch._foreach_mul_([p.data for p in m.parameters()], 1.5)
o, l, log, total = {'k': 1.5}, [], [], 0
"""

MODES = ["no_grad", "inference_mode", "enable_grad", "enable_grad, of x"]
MEMORY = ["contiguous", "channels last", "slice", "one image", "no image"]
SECOND = ["own", "x", "overlapping", "a view of x"]


def arguments(call: Call, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Any, str]:
    images = {"one image": 1, "no image": 0}.get(call.memory, 2)
    memory = draw(images, 6, 6, 7)
    x = memory[:, :4, :, :6]
    if call.memory == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif call.memory != "slice" and call.second != "overlapping":
        x = x.contiguous()
    second = {"x": x, "a view of x": x.mT, "overlapping": memory[:, 2:, :, 1:]}
    t = second.get(call.second, draw(images, 4, 6, 6))
    return x.requires_grad_(call.mode.endswith("x")), t, call.number, call.mode.split(",")[0]


def _source(steps: list[Any]) -> str:
    """The statements of steps."""
    lines = []
    for word, number, *inner in steps:
        if inner:
            block = textwrap.indent(_source(inner[0]), "    ")
            if word == "raise":
                block = textwrap.dedent(block)
            text = BLOCKS[word].replace("CONDITION", number).replace("STEPS", block)
        else:
            text = STEPS[word].replace("NUMBER", str(number))
        lines.append(text)
    return "\n".join(lines) or "pass"


def _script(program: Program) -> dict[str, Any]:
    """The program as ``law`` takes it, see conftest.py."""
    results = program.container.replace("RESULTS", ", ".join(program.results))
    changes = [f"\n    if i == {i}: {text}" for i, text in program.changes]
    may_fail = "contextlib.suppress(RuntimeError)"  # to write to tensors of inference mode
    return {
        "forward": "global total\nh, kept, maps = x, x, {}\n"
        f"{_source(program.steps)}\nreturn {results}",
        "takes": program.takes,
        "init": _INIT,
        "before": "x, t, k, mode = arguments(CALLS[i], draw)\n"
        f"with torch.no_grad(), {may_fail}:{''.join(changes) or ' pass'}",
        "call": f"m({program.takes})",
        "mode": "getattr(torch, mode)()",
        "calls": len(program.calls),
        "names": {"Out": Out, "CALLS": program.calls, "arguments": arguments},
    }


def _steps(inner: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    step = st.tuples(st.sampled_from([*STEPS]), st.integers(0, 3))
    if inner is not None:
        block = st.tuples(st.sampled_from([*BLOCKS]), st.sampled_from(CONDITIONS), inner)
        step = st.one_of(step, step, step, block)
    return st.lists(step, min_size=1, max_size=8 if inner is not None else 4)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Most calls are alike, so that they are replayed."""
    number = st.sampled_from([1, True, 1.0, 2, 0.5, -0.0])
    parts = [st.sampled_from(words) for words in (MODES, MEMORY, SECOND)]
    kinds = draw(st.lists(st.builds(Call, *parts, number), min_size=1, max_size=2))
    order = draw(st.lists(st.sampled_from([0, 0, 0, 0, -1]), min_size=6, max_size=8))
    change = st.tuples(st.integers(1, 5), st.sampled_from(CHANGES))
    return Program(
        draw(st.sampled_from(["x", "x, t", "x, k", "x, t, k, o, l"])),
        draw(_steps(_steps(_steps()))),
        draw(st.lists(st.sampled_from(RESULTS), min_size=1, max_size=3)),
        draw(st.sampled_from(CONTAINERS)),
        [kinds[i] for i in order],
        draw(st.lists(change, max_size=2)),
    )


EXAMPLES = int(os.environ.get("VISION_BACKBONES_LAW_EXAMPLES", 100))


def _with_found(test: Any) -> Any:
    for program in FOUND:
        test = example(program=program)(test)
    return test


@pytest.mark.timeout(600 + 4 * EXAMPLES)
@_with_found
@fuzz(EXAMPLES)
@given(program=programs())
def test_programs(program: Program, law: Callable[..., None]) -> None:
    law(**_script(program), raises=None, within=1e-3)
