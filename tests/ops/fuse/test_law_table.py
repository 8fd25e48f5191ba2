"""The law of ``fuse()`` as a table: small modules × what changes × when.

A row is the forward of a module ``m`` with an image ``x`` and, where needed, other parts of the
script, see ``_play`` in conftest.py. Names without ``m.`` are globals of the module's file.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  (whose operators are rows)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import backbones
from ops.neighborhood import na2d


@dataclass
class Options:
    scale: Any = 1.0


class Slotted:
    __slots__ = ("scale",)


class Maps(OrderedDict):
    """With a name beside its items."""

    name = None


Pair = namedtuple("Pair", "first second")


class Own(Tensor): ...


class Watch(TorchFunctionMode):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append(func.__name__)
        return func(*args, **(kwargs or {}))


class WatchOperators(TorchDispatchMode):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append(str(func))
        return func(*args, **(kwargs or {}))


def counting() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def backward(y: Tensor) -> Tensor:
    y.square().sum().backward()
    return y


NAMES = {
    **{"Options": Options, "Slotted": Slotted, "Maps": Maps, "Pair": Pair, "Own": Own},
    **{"Watch": Watch, "WatchOperators": WatchOperators, "counting": counting},
    **{"backward": backward},
}


def row(forward: str | None, **parts: Any) -> dict[str, Any]:
    return {"forward": forward, **parts}


# fmt: off

# What forward itself keeps.
STATE = {
    "a counter": row("m.n += 1; return m.body(x) * m.n", init="m.n = 0"),
    "a toggle": row("m.on = not m.on; return m.body(x) * (1 if m.on else -1)", init="m.on = False"),
    "the last output": row("old, m.old = m.old, m.body(x); return m.old - old", init="m.old = 0.0"),
    "the last input": row("m.last = x; return m.body(x)"),
    "features for others": row("m.feat = F.relu(m.a(x)); return m.c(m.feat)"),
    "an output that others write to": row("m.feat = m.body(x); return m.feat * 2",
        change="m.feat.mul_(3)", mode="torch.no_grad()"),
    "a growing cache": row(
        "y = m.body(x); m.kv = y if m.kv is None else torch.cat([m.kv, y], 2); return m.kv",
        init="m.kv = None"),
    "an average, assigned": row("m.buf = 0.5 * m.buf + m.body(x).mean(); return m.body(x) + m.buf"),
    "an average, in place": row("m.buf.lerp_(m.body(x).mean(), 0.5); return m.body(x) + m.buf"),
    "a buffer that counts": row("m.buf.add_(1); return m.body(x) + m.buf"),
    "an element of a buffer": row("m.buf[0] = x.mean(); return m.body(x) + m.buf"),
    "a buffer's data": row("m.buf.data += 1; return m.body(x) + m.buf"),
    "a plain tensor in place": row("m.t += 1; return m.body(x) + m.t", init="m.t = torch.ones(1)"),
    "BatchNorm in training": row("m.norm(m.body(x))", init="m.norm = nn.BatchNorm2d(8)",
        then="m.norm.train()"),
    "BatchNorm with a cumulative average": row("m.norm(m.body(x))",
        init="m.norm = nn.BatchNorm2d(8, momentum=None)", then="m.norm.train()"),
    "F.batch_norm in training": row("F.batch_norm(m.body(x), m.mean, m.var, training=True)",
        init="m.register_buffer('mean', torch.zeros(8)); m.register_buffer('var', torch.ones(8))"),
    "the first output": row("if m.ref is None: m.ref = m.body(x)\nreturn m.body(x) + m.ref",
        init="m.ref = None"),
    "an attribute of the first call": row(
        "if not hasattr(m, 'ref'): m.ref = m.body(x).mean()\nreturn m.body(x) + m.ref"),
    "anchors of the last size, as YOLO's heads": row("""
        if m.size != x.shape[2:]:
            m.size, m.anchors = x.shape[2:], torch.arange(float(x.shape[3]))
        return m.body(x) + m.anchors
        """, init="m.size = None", before="x = draw(2, 3, 12, 12) if i in (3, 6, 7) else x",
        calls=9),
    "a list": row("m.log.append(len(x)); return m.body(x) * len(m.log)", init="m.log = []"),
    "a list, and nothing depends on it": row("m.log.append(len(x)); return m.body(x)",
        init="m.log = []"),
    "a dict": row("m.log['n'] += 1; return m.body(x) * m.log['n']", init="m.log = {'n': 0}"),
    "a set": row("m.log.add(len(m.log)); return m.body(x) * len(m.log)", init="m.log = set()"),
    "a deque of outputs": row("m.last.append(m.body(x)); return sum(m.last)",
        init="m.last = collections.deque([], 2)"),
    "an object": row("m.state.scale += 1; return m.body(x) * m.state.scale",
        init="m.state = Options()"),
    "an array": row("m.t += 1; return m.body(x) * float(m.t[0])", init="m.t = np.zeros(1)"),
    "an iterator": row("m.body(x) * next(m.ids)", init="m.ids = itertools.count(1)"),
    "a layer made in the first call": row("""
        if m.late is None: m.late = nn.Conv2d(8, 8, 1).requires_grad_(False)
        return m.late(m.body(x))
        """, init="m.late = None"),
    "a buffer made in the first call": row("""
        if not hasattr(m, 'late'): m.register_buffer('late', x.mean((0, 2, 3)))
        return m.body(x) * m.late.sum()
        """),
    "an attribute that goes": row("m.body(x) * m.__dict__.pop('once', 3.0)", init="m.once = 5.0"),
    "the mode of a layer": row("m.drop.train(not m.drop.training); return m.drop(m.body(x))",
        init="m.drop = nn.Dropout(0.5)"),
    "weights in place": row("m.a.weight.data.mul_(0.9); return m.body(x)"),
    "weights replaced": row(
        "m.c.bias = nn.Parameter(m.c.bias * 2, requires_grad=False); return m.body(x)"),
    "layers swapped": row("m.k, m.l = m.l, m.k; return m.k(x)",
        init="m.k, m.l = (nn.Conv2d(3, 8, 3) for _ in range(2))"),
    "hooks from the first call on, as in transformers 5": row("""
        if not m.hooked:
            m.hooked = True
            for layer in (m.a, m.c):
                layer.register_forward_hook(lambda layer, args, out: m.maps.append(out))
        m.maps = []
        return m.body(x), tuple(m.maps)
        """, init="m.hooked = False"),
    "hooks that find their list in the context": row("""
        if not m.hooked:
            m.hooked = True
            for layer in (m.a, m.c):
                layer.register_forward_hook(lambda layer, args, out: maps.get().append(out))
        token = maps.set([])
        try:
            return {'y': m.body(x), 'maps': maps.get()}
        finally:
            maps.reset(token)
        """, init="m.hooked = False; maps = contextvars.ContextVar('maps')"),
    "hooks of one call": row("""
        maps = []
        with m.a.register_forward_hook(lambda layer, args, out: maps.append(out)):
            return m.body(x), maps
        """),
    "a class attribute": row("Net.n += 1; return m.body(x) * Net.n", init="Net.n = 0"),
    "a global": row("global n; n += 1; return m.body(x) * n", init="n = 0"),
    "a global, and nothing depends on it": row("global n; n += 1; return m.body(x)", init="n = 0"),
    "a global list": row("log.append(len(x)); return m.body(x)", init="log = []"),
    "a global list, read": row("log.append(len(x)); return m.body(x) * len(log)", init="log = []"),
    "a closure": row("m.body(x) * step()", init="step = counting()"),
    "a default argument": row("memo.append(1); return m.body(x) * len(memo)", takes="x, memo=[]"),
    "an attribute of a function": row("step.n += 1; return m.body(x) * step.n",
        init="step = lambda: 0; step.n = 0"),
    "a cached table, written": row("table().add_(1); return m.body(x) + table()",
        init="table = functools.cache(lambda: torch.arange(16.0))"),
    "a memoised method": row("m.body(x) + m.table(x.shape[3])",
        init="m.table = functools.cache(lambda n: log.append(n) or torch.arange(n)); log = []",
        before="x = draw(2, 3, 12, 12) if i == 4 else x"),
    "of a thread": row("local.n += 1; return m.body(x) * local.n",
        init="local = threading.local(); local.n = 0"),
    "what it prints": row("print('call', len(x)); return m.body(x)"),
    "a note on the input": row("x.seen = True; return m.body(x)"),
    "in a layer inside": row("m.inner(m.inner(x)[:, :3])", init="""
        class Inner(Net):
            n = 0
            def forward(m, x):
                m.n += 1
                return m.body(x) * m.n
        m.inner = Inner()
        """),
    "in a hook": row("m.body(x)",
        init="log = []; m.a.register_forward_hook(lambda m, args, out: log.append(len(out)))"),
    "in a pre-hook of the whole": row("m.body(x)",
        init="log = []; m.register_forward_pre_hook(lambda m, args: log.append(1))"),
    "a weight that another thread changes in the first call": row("""
        y = m.body(x)
        if not log: log.append(aside(lambda: m.a.weight.mul_(3)) is None)
        return y
        """, init="log = []"),
}

CHANCE = {
    "dropout": row("F.dropout(m.body(x), 0.5, training=True)"),
    "dropout, seeded between calls": row("F.dropout(m.body(x), 0.5, training=True)",
        change="torch.manual_seed(5)"),
    "a layer of dropout": row("m.drop(m.body(x))", init="m.drop = nn.Dropout2d(0.5)",
        then="m.drop.train()"),
    "noise": row("m.body(x) + torch.randn(8, 1, 1)"),
    "noise like the input": row("m.body(x + 0.1 * torch.randn_like(x))"),
    "noise beside a result": row("m.body(x), torch.rand(3)"),
    "noise in place": row("y = m.body(x); y[:, :2].normal_(); return y"),
    "a generator": row("m.body(x) + torch.rand(1, generator=g)",
        init="g = torch.Generator().manual_seed(3)"),
    "random": row("m.body(x) * random.random()"),
    "NumPy's": row("m.body(x) * np.random.rand()"),
    "NumPy's generator": row("m.body(x) * g.random()", init="g = np.random.default_rng(0)"),
    "a chosen layer": row("random.choice([m.a, m.k])(x)", init="m.k = nn.Conv2d(3, 8, 3)"),
    "stochastic depth": row("if torch.rand(()) < 0.5: return m.body(x)\nreturn m.body(x) * 2"),
    "a permutation": row("m.body(x)[:, torch.randperm(8)]"),
    "seeded inside": row("torch.manual_seed(3); return m.body(x) + torch.rand(1)"),
    "drawn and thrown away": row("torch.rand(3); random.random(); return m.body(x)"),
    "restored inside": row("with torch.random.fork_rng():\n    return m.body(x) + torch.rand(1)"),
}

# Values of tensors that reach Python.
VALUES = {
    "a branch": row("if x.mean() > 0: return m.body(x)\nreturn -m.body(x)", calls=8),
    "a branch on a layer's output": row("y = m.body(x); return y if y.mean() > 0.01 else -y"),
    "a loop": row("y = m.body(x)\nwhile y.abs().max() > 0.1: y = y / 2\nreturn y"),
    "item": row("m.body(x) * x.mean().item()"),
    "float": row("m.body(x) * float(x.mean())"),
    "int as a size": row("m.body(x), torch.ones(int(x.abs().sum()) % 5)"),
    "an index": row("m.body(x) * (2, 3, 4)[x.mean((0, 2, 3)).argmax()]"),
    "a channel": row("m.body(x)[:, int(x.mean((0, 2, 3)).argmax())]"),
    "boxes that torchvision keeps": row("""
        corner, size, score = m.tokens(x)[0].abs().split((2, 2, 4), 1)
        boxes = torch.cat((corner, corner + size), 1)
        return boxes[torch.ops.torchvision.nms(boxes, score[:, 0], 0.3)]
        """),
    "a size that another operator decides": row("torch.ops.law.positive(m.body(x)[0, 0, 0])"),
    "a size that may be another operator's to decide": row("torch.ops.law.unknown(m.body(x))"),
    "tolist": row("m.body(x) * x[0, 0, 0, :2].tolist()[0]"),
    "tolist of an attribute": row("m.body(x) * m.t.tolist()[0]", init="m.t = torch.ones(1)",
        change="m.t.mul_(3)"),
    "numpy": row("m.body(x) * float(x.numpy().mean())"),
    "np.asarray": row("m.body(x) * float(np.asarray(x).sum())"),
    "a function of NumPy": row("m.body(x) * float(np.abs(x).max())"),
    "through NumPy and back": row("torch.from_numpy(np.tanh(m.body(x).numpy())) + m.body(x)"),
    "written by NumPy": row("y = m.body(x); y.numpy()[:, :2] *= 3; return y * 2"),
    "an input written by NumPy": row("x.numpy()[:] *= 2; return m.body(x)"),
    "DLPack": row("m.body(x) * float(np.from_dlpack(x).mean())"),
    "bytes of the storage": row("m.body(x) * x.untyped_storage()[2]"),
    "data_ptr": row("m.body(x) * (2 if x.data_ptr() == kept.data_ptr() else 3)",
        init="kept = draw()", before="x = kept if i in (2, 5) else x", calls=8),
    "which object it is": row("m.body(x) * (2 if x is kept else 3)", init="kept = draw()",
        before="x = kept if i in (2, 5) else x", calls=8),
    "a formatted value": row("m.body(x), f'{x.mean():.3f}'"),
    "a printed tensor": row("m.body(x), str(x[0, 0, 0, :3])"),
    "iterated": row("m.body(x) * sum(float(v) for v in x.mean((1, 2, 3)))"),
    "the larger one": row("m.body(x) * max(x[0].mean(), x[1].mean())"),
    "sorted": row("torch.cat(sorted(m.body(x).split(1), key=lambda y: y.mean()))"),
    "equal": row("m.body(x) * (2 if torch.equal(x, kept) else 3)", init="kept = draw()",
        before="x = kept.clone() if i == 4 else x"),
    "close": row("m.body(x) * (2 if torch.allclose(x, kept) else 3)", init="kept = draw()",
        before="x = kept.clone() if i == 4 else x"),
    "the positive ones": row("m.body(x), x[x > 0]"),
    "how many are positive": row("m.body(x) * len((x > 0).nonzero())"),
    "how many kinds": row("m.body(x) * len(x.round().unique())"),
    "a tensor of a number": row("m.body(x) + torch.tensor([float(x.mean())])"),
    "a pickle": row("m.body(x) * pickle.loads(pickle.dumps(x)).mean()"),
    "a copy": row("m.body(copy.deepcopy(x))"),
    "math": row("m.body(x) * math.sqrt(x.var())"),
    "the batch": row("m.body(x) * len(x)", before="x = draw(1 + i % 2, 3, 16, 16)", calls=8),
    "the size": row("m.body(x) + torch.arange(x.shape[3]) // 2",
        before="x = draw(2, 3, 16, 8 + 4 * (i % 3))", calls=9),
    "a branch around a network": row("if x.mean() > 0: return m.inner(x)\nreturn m.inner(-x) * 2",
        init="m.inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))", calls=8),
    "beside an effect": row("""
        log.append(len(x))
        y = m.body(x)
        return y * float(y.detach().numpy().max())
        """, init="log = []"),
}

_INNER = """
class Inner(Net):
    def forward(m, x):
        return m.body(x) * getattr(m, 'k', 1)
m.inner = Inner()"""

# What others change between calls.
CHANGES = {
    "an attribute": row("m.body(x) * m.k", init="m.k = 1.0", change="m.k += 1"),
    "of another type": row("m.body(x), torch.full((2,), m.k)", init="m.k = 1",
        change="m.k = [1, True, 1.0][([int, bool, float].index(type(m.k)) + 1) % 3]"),
    "a config": row("m.body(x) * m.o.scale", init="m.o = Options()", change="m.o.scale += 1"),
    "a nested config": row("m.body(x) * m.o.scale['k'][0].scale",
        init="m.o = Options({'k': [Options()]})", change="m.o.scale['k'][0].scale += 1"),
    "an object with slots": row("m.body(x) * m.o.scale", init="m.o = Slotted(); m.o.scale = 1",
        change="m.o.scale += 1"),
    "a dict": row("m.body(x) * m.d['k']", init="m.d = {'k': 1.0}", change="m.d['k'] += 1"),
    "a key of a dict": row("m.body(x) * len(m.d)", init="m.d = {}", change="m.d[len(m.d)] = None"),
    "a list": row("m.body(x) * m.l[0]", init="m.l = [1.0]", change="m.l[0] += 1"),
    "the length of a list": row("m.body(x) * len(m.l)", init="m.l = [1.0]",
        change="m.l.append(1.0)"),
    "a set": row("m.body(x) * len(m.s)", init="m.s = {0}", change="m.s.add(len(m.s))"),
    "an array": row("m.body(x) * float(m.t[0])", init="m.t = np.ones(1)", change="m.t[0] += 1"),
    "a plain tensor": row("m.body(x) * m.t", init="m.t = torch.ones(1)", change="m.t.add_(1)"),
    "a plain tensor, replaced": row("m.body(x) * m.t", init="m.t = torch.ones(1)",
        change="m.t = m.t + 1"),
    "a plain tensor's data": row("m.body(x) * m.t", init="m.t = torch.ones(1)",
        change="m.t.data = m.t + 1"),
    "tensors in a list": row("m.body(x) * m.l[0]", init="m.l = [torch.ones(1)]",
        change="m.l[0].add_(1)"),
    "layers in a list": row("m.l[0](m.body(x))",
        init="m.l = [nn.Conv2d(8, 8, 1).requires_grad_(False)]", change="m.l[0].weight.mul_(2)"),
    "layers in an object": row("m.o.scale(m.body(x))",
        init="m.o = Options(nn.Conv2d(8, 8, 1).requires_grad_(False))",
        change="m.o.scale.weight.mul_(2)"),
    "a function of an attribute": row("m.k(m.body(x))", init="m.k = F.relu",
        change="m.k = torch.sigmoid"),
    "a partial function": row("m.k(m.body(x))",
        init="m.k = functools.partial(F.leaky_relu, negative_slope=0.1)",
        change="m.k.keywords['negative_slope'] += 0.1"),
    "a class attribute": row("m.body(x) * m.k", init="Net.k = 1.0", change="Net.k += 1"),
    "a method of the class": row("m.body(x)", change="Net.body = lambda m, x: m.c(m.a(x).abs())"),
    "a method of the object": row("m.body(x)", change="m.body = lambda x: m.c(m.a(x).abs())"),
    "forward of the object": row("m.body(x)", change="m.forward = lambda x: m.c(m.a(x).abs())"),
    "forward of the class": row("m.body(x)", change="Net.forward = lambda m, x: m.a(x) + 1"),
    "forward of a layer": row("m.body(x)",
        change="m.a.forward = lambda x: F.conv2d(x, m.a.weight * 2, None, 1, 1)"),
    "the class of a layer": row("m.body(x)", init="""
        class Other(nn.Conv2d):
            def forward(m, x):
                return super().forward(x) * 2
        """, change="m.a.__class__ = Other if type(m.a).__name__ != 'Other' else nn.Conv2d"),
    "a global": row("m.body(x) * k", init="k = 1.0", change="k += 1"),
    "a global list": row("m.body(x) * k[0]", init="k = [1.0]", change="k[0] += 1"),
    "a global function": row("k(m.body(x))", init="k = torch.relu",
        change="k = torch.sigmoid if k is torch.relu else k"),
    "a global tensor": row("m.body(x) * k", init="k = torch.ones(1)", change="k.add_(1)"),
    "a global layer": row("k(m.body(x))", init="k = nn.Conv2d(8, 8, 1).requires_grad_(False)",
        change="k.weight.mul_(2)"),
    "a closure": row("m.body(x) * k()", init="""
        def closure():
            value = 1.0
            def get(): return value
            def more():
                nonlocal value
                value += 1
            return get, more
        k, more = closure()
        """, change="more()"),
    "a default": row("m.body(x) * k", takes="x, k=1.0", change="Net.forward.__defaults__ = (2.0,)",
        call="Net.forward(m, x)"),
    "a cached tensor": row("m.body(x) + k(16)",
        init="k = functools.cache(lambda n: torch.arange(float(n)))",
        change="with torch.inference_mode(): k(16).add_(1)"),
    "an environment variable": row("m.body(x) * len(os.environ['LAW_ROW'])",
        init="os.environ['LAW_ROW'] = 'x'", change="os.environ['LAW_ROW'] += 'x'",
        end="del os.environ['LAW_ROW']"),
    "a context variable": row("m.body(x) * k.get()",
        init="k = contextvars.ContextVar('k', default=1)", change="k.set(k.get() + 1)"),
    "weights in place": row("m.body(x)", change="m.a.weight.mul_(2)"),
    "one element of a weight": row("m.body(x)", change="m.c.weight[0, 0, 0, 0] += 1"),
    "a view of a weight": row("m.body(x)", change="m.a.weight[1].detach().view(-1).zero_()"),
    "weights in inference mode": row("m.body(x)",
        change="with torch.inference_mode(): m.a.weight.mul_(2)"),
    "several weights at once": row("m.body(x)", change="torch._foreach_mul_([*m.parameters()], 2)"),
    "weights in place, uncounted": row("m.norm(m.body(x)) * m.scale",
        init="m.norm = nn.BatchNorm2d(8); m.scale = nn.Parameter(torch.ones(1))",
        change="for p in m.parameters(): p.data.mul_(1.5).add_(0.1)"),
    "weights' averages copied": row("m.body(x)",
        change="for p in m.parameters(): p.data.copy_(p.data * 0.9 + 0.1)"),
    "weights' data transposed": row("m.k(m.tokens(x))", init="m.k = nn.Linear(8, 8)",
        change="m.k.weight.data = m.k.weight.data.t()"),
    "weights' data cut": row("m.k(m.tokens(x)).sum(-1)", init="m.k = nn.Linear(8, 8, bias=False)",
        change="m.k.weight.data = m.k.weight.data[:5 - i % 2]"),
    "weights by NumPy": row("m.body(x)", change="m.a.weight.numpy()[...] *= 2"),
    "weights' data": row("m.body(x)", change="m.a.weight.data = m.a.weight.data * 2"),
    "weights replaced": row("m.body(x)",
        change="m.a.weight = nn.Parameter(m.a.weight * 2, requires_grad=False)"),
    "weights loaded": row("m.body(x)",
        change="m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()})"),
    "weights loaded and assigned": row("m.body(x)",
        change="m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True)",
        then="m.requires_grad_(False)"),
    "weights from a vector": row("m.body(x)",
        change="v = nn.utils.parameters_to_vector(m.parameters()); "
        "nn.utils.vector_to_parameters(v * 2, m.parameters()); del v"),
    "no bias any more": row("m.body(x)", change="m.c.bias = None"),
    "weights that need gradients": row("m.body(x)",
        change="m.c.bias.requires_grad_(not m.c.bias.requires_grad)", mode="torch.enable_grad()"),
    "a buffer in place": row("m.body(x) + m.buf", change="m.buf.add_(1)"),
    "a buffer replaced": row("m.body(x) + m.buf", change="m.buf = m.buf + 1"),
    "a norm's average": row("m.norm(m.body(x))", init="m.norm = nn.BatchNorm2d(8)",
        change="m.norm.running_mean.add_(1)"),
    "a norm's eps": row("m.norm(m.body(x))", init="m.norm = nn.BatchNorm2d(8)",
        change="m.norm.eps += 1"),
    "a norm's mode": row("m.norm(m.body(x))", init="m.norm = nn.BatchNorm2d(8)",
        change="m.norm.train(not m.norm.training)"),
    "a stride": row("m.body(x)", change="m.c.stride = (2, 2) if m.c.stride == (1, 1) else (1, 1)"),
    "a layer": row("m.body(x)", change="m.c = nn.Conv2d(8, 8, 1).requires_grad_(False)"),
    "an activation": row("m.act(m.body(x))", init="m.act = nn.ReLU()",
        change="m.act = nn.Sigmoid()"),
    "layers of a Sequential": row("m.all(x)", init="m.all = nn.Sequential(m.a, m.c)",
        change="m.all.append(nn.Sigmoid())"),
    "the order of layers": row("m.l[1](m.l[0](m.body(x)))",
        init="m.l = nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.Sigmoid()])",
        change="m.l[0], m.l[1], m.l[2] = m.l[1], m.l[2], m.l[0]"),
    "a layer's hook": row("m.body(x)",
        change="m.a.register_forward_hook(lambda m, args, out: out * 2)"),
    "a layer's pre-hook": row("m.body(x)",
        change="m.c.register_forward_pre_hook(lambda m, args: (args[0] * 2,))"),
    "a backward hook": row("m.body(x)", init="log = []",
        change="m.a.register_full_backward_hook(lambda *_: log.append(1))",
        before="x.requires_grad_()", mode="torch.enable_grad()", call="backward(m(x))"),
    "a hook that sees keywords": row("m.inner(x=x)", init=f"{_INNER}; log = []",
        change="m.inner.register_forward_hook(lambda m, args, named, out: log.append([*named]), "
        "with_kwargs=True)"),
    "a hook of the whole": row("m.body(x)",
        change="m.register_forward_hook(lambda m, args, out: out * 2)"),
    "a hook that goes": row("m.body(x)",
        init="log = []; h = [m.a.register_forward_hook(lambda *_: log.append(1)) for _ in '1234']",
        change="h.pop().remove()"),
    "a hook of all modules": row("m.body(x)", init="log = []; h = []",
        change="h.append(nn.modules.module.register_module_forward_hook(lambda m, args, out: "
        "log.append(type(m).__name__)))", end="for hook in h: hook.remove()"),
    "a parametrisation": row("m.body(x)", init="m.a = nn.utils.parametrizations.weight_norm(m.a)",
        change="m.a.parametrizations.weight.original0.mul_(2)"),
    "a layer shared with another network": row("m.body(x)",
        init="other = nn.Sequential(m.a, nn.ReLU())", then="other = fuse(other)",
        change="other[0].weight.mul_(2)"),
    "in a network inside": row("if x.mean() > 0: return m.inner(x)\nreturn m.inner(-x) * 2",
        init=f"{_INNER}; m.inner.k = 1.0", change="m.inner.k += 1; m.inner.a.weight.mul_(2)"),
}

ARGUMENTS = {
    "1, True and 1.0": row("m.body(x) * (2 if k is True else 3), torch.full((2,), k)", takes="x, k",
        before="k = [True, 1, 1.0][i // 3]", call="m(x, k)", calls=9),
    "1, True and 1.0 in turns": row("m.body(x) * (2 if k is True else 3), torch.full((2,), k)",
        takes="x, k", before="k = [1, 1.0, True][i % 3]", call="m(x, k)", calls=9),
    "numbers of NumPy": row("m.body(x), torch.tensor(k)", takes="x, k",
        before="k = [1, np.int32(1), np.float32(1)][i // 3]", call="m(x, k)", calls=9),
    "zero and minus zero": row("m.body(x) * math.copysign(2.0, k)", takes="x, k",
        before="k = [0.0, -0.0][i // 3]", call="m(x, k)"),
    "numbers that nest": row("m.body(x), torch.full((2,), k['k'][0])", takes="x, k",
        before="k = {'k': (True if i < 3 else 1,)}", call="m(x, k)"),
    "a number or a tensor": row("m.body(x) * k", takes="x, k",
        before="k = [2.0, torch.tensor(float(i)), 3][i % 3]", call="m(x, k)", calls=9),
    "None or a tensor": row("m.body(x) if k is None else m.body(x) * k.mean()", takes="x, k=None",
        before="k = draw(1) if i % 2 else None", call="m(x, k)", calls=8),
    "words": row("getattr(m.body(x), k)(1)", takes="x, k", before="k = ['sum', 'mean'][i // 3]",
        call="m(x, k)"),
    "dtypes": row("m.body(x).to(k)", takes="x, k",
        before="k = [torch.float64, torch.bfloat16][i // 3]", call="m(x, k)"),
    "slices": row("m.body(x)[k]", takes="x, k", before="k = slice(i // 3, 2)", call="m(x, k)"),
    "an object": row("m.body(x) * o.scale", takes="x, o", init="o = Options()",
        change="o.scale += 1", call="m(x, o)"),
    "an object that forward writes": row("o.scale += 1; return m.body(x)", takes="x, o",
        init="o = Options()", call="m(x, o)"),
    "a tensor in an object": row("m.body(x) * o.scale", takes="x, o",
        init="o = Options(torch.ones(1))", change="o.scale.add_(1)", call="m(x, o)"),
    "a new tensor in an object": row("m.body(x) * o.scale", takes="x, o", init="o = Options()",
        before="o.scale = draw(1)", call="m(x, o)"),
    "images in an object": row("m.body(o.scale)", takes="o", before="o = Options(x)", call="m(o)"),
    "a module": row("k(m.body(x))", takes="x, k",
        init="k = nn.Conv2d(8, 8, 1).requires_grad_(False)", change="k.weight.mul_(2)",
        call="m(x, k)"),
    "a function": row("m.body(x) * k()", takes="x, k", init="k = counting()", call="m(x, k)"),
    "another function in each call": row("k(m.body(x))", takes="x, k",
        before="k = lambda y, i=i: y * i", call="m(x, k)"),
    "a list that grows": row("k.append(len(x)); return m.body(x) * len(k)", takes="x, k",
        init="k = []", call="m(x, k)"),
    "a list that forward empties": row("m.body(x) * k.pop()", takes="x, k", before="k = [2.0]",
        call="m(x, k)"),
    "a dict that forward fills": row("k['y'] = m.body(x); return k['y'] * 2", takes="x, k",
        before="k = {}", call="m(x, k)"),
    "a set that forward fills": row("k.add(len(k)); return m.body(x)", takes="x, k",
        init="k = set()", call="m(x, k)"),
    "an iterator": row("m.body(x) * next(k)", takes="x, k", init="k = iter(range(1, 20))",
        call="m(x, k)"),
    "a generator": row("m.body(x) * sum(k)", takes="x, k", before="k = (i + j for j in range(3))",
        call="m(x, k)"),
    "a random generator": row("m.body(x) + torch.rand(1, generator=k)", takes="x, k",
        init="k = torch.Generator().manual_seed(0)", call="m(x, k)"),
    "an array": row("m.body(x) * float(k[0])", takes="x, k", init="k = np.ones(1)", before="k += i",
        call="m(x, k)"),
    "an array that forward writes": row("k += 1; return m.body(x)", takes="x, k",
        init="k = np.ones(1)", call="m(x, k)"),
    "a list of images": row("[m.body(y) for y in x]",
        before="x = [draw() for _ in range(1 + i // 3)]"),
    "a dict of images": row("{k: m.body(y) for k, y in x.items()}",
        before="x = {'k': draw(), 'l': draw()}"),
    "a dict in another order": row("torch.cat([m.body(y) for y in x.values()])",
        before="x = {'k': draw(), 'l': draw()} if i < 3 else {'l': draw(), 'k': draw()}"),
    "keywords": row("m.body(x) * k - l", takes="x, *, k=1, l=0",
        call="m(x, k=2) if i % 2 else m(x=x, l=3, k=2)", calls=8),
    "any arguments": row("m.body(x) + sum(more) + sum(named.values())", takes="x, *more, **named",
        call="m(x, *range(i % 3), **dict.fromkeys('kl'[: i % 2], 2.0))", calls=12),
    "by place or by name": row("m.body(x)", call="m(x) if i % 2 else m(x=x)", calls=8),
    "no tensors": row("m.body(m.image)", takes="", init="m.image = draw()", call="m()"),
    "several tensors": row("m.body(x) * y + z", takes="x, y, z=0",
        before="y = draw(1); z = draw(16)", call="m(x, y, z)"),
    "one tensor twice": row("x.mul_(2); return m.body(x) + m.body(y)", takes="x, y",
        before="y = x if i in (2, 3, 6) else draw()", call="m(x, y)", calls=9),
    "one tensor twice, always": row("x.mul_(2); return m.body(x) + m.body(y)", takes="x, y",
        call="m(x, x)"),
    "overlapping views": row("x.mul_(2); return m.body(x) + m.body(y)", takes="x, y",
        before="b = draw(2, 5, 16, 16); x = b[:, :3]; y = (b if i % 4 > 1 else b.clone())[:, 2:]",
        call="m(x, y)", calls=9),
    "neighbouring views": row("x.mul_(2); return m.body(x) + m.body(y)", takes="x, y",
        before="b = draw(2, 6, 16, 16); x, y = b.split(3, 1)", call="m(x, y)"),
    "transposed views": row("x.add_(1); return m.body(x) + m.body(y)", takes="x, y",
        before="y = x.mT", call="m(x, y)"),
    "a weight of the module": row("m.body(x) * k.mean()", takes="x, k", call="m(x, m.a.bias)",
        change="m.a.bias.add_(1)"),
    "the last output": row("m.body(x)[:, :3].tanh()", before="x = out if i else x", spoil=False),
    "the state of the last call": row("h = h / 2 + m.body(x).mean(); return m.body(x) + h, h",
        takes="x, h", before="h = out[1] if i else torch.zeros(1)", call="m(x, h)"),
    "multiplied in place": row("m.body(x.mul_(2))"),
    "a part written": row("x[:, 0] = 0; return m.body(x)"),
    "a part written at last": row("y = m.body(x); x[:, 1:] += 1; return y"),
    "written through a view": row("x.view(-1)[::2].zero_(); return m.body(x)"),
    "data written": row("x.data.mul_(2); return m.body(x)"),
    "data replaced": row("x.data = x.data * 2; return m.body(x)"),
    "a shape changed in place": row("x.unsqueeze_(0); return m.body(x[0])"),
    "a result's place": row("torch.mul(m.body(x), 2, out=k); return k.sum()", takes="x, k",
        before="k = torch.empty(2, 8, 16, 16)", call="m(x, k)"),
    "a state in place": row("h.copy_(h / 2 + m.body(x).mean()); return m.body(x) + h", takes="x, h",
        init="h = torch.zeros(1)", call="m(x, h)"),
    "a normalised input": row("x.sub_(x.mean()).div_(x.std()); return m.body(x)"),
    "memory in any order": row("m.body(x)", before="x = [x, x.mT, x.flip(0), "
        "x.contiguous(memory_format=torch.channels_last), draw(2, 3, 16, 32)[..., ::2], "
        "draw(2, 3, 16, 17)[..., 1:], draw(2, 1, 16, 16).expand(2, 3, 16, 16)][i % 7]", calls=21),
    "batches": row("m.body(x)", before="x = draw([2, 1, 0, 3, 0][i % 5], 3, 16, 16)", calls=15),
    "an empty batch at first": row("m.body(x)", before="x = x[: i // 3]", calls=9),
    "sizes": row("F.adaptive_avg_pool2d(m.body(x), 2)", before="x = draw(1, 3, 9 + i % 4, 8)",
        calls=12),
    "gradients of the input": row("m.body(x)", before="x.requires_grad_()",
        mode="torch.enable_grad()", call="backward(m(x))"),
    "gradients now and then": row("m.body(x)", before="x.requires_grad_(i % 3 == 2)",
        mode="torch.enable_grad()", call="backward(m(x)) if x.requires_grad else m(x)", calls=9),
    "an input with gradients, in no_grad": row("m.body(x)", before="x.requires_grad_(i % 2 == 0)"),
    "a subclass of Tensor": row("m.body(x)", before="x = x.as_subclass(Own) if i % 2 else x"),
    "a Parameter": row("m.body(x)", before="x = nn.Parameter(x, requires_grad=False)"),
    "other dtypes": row("m.body(x.float())",
        before="x = x.to([torch.float32, torch.float64, torch.int8, torch.bfloat16][i % 4])",
        calls=12),
    "sparse": row("m.body(x.to_dense())", before="x = x.relu().to_sparse()"),
    "complex": row("m.body(x.abs())", before="x = torch.complex(x, draw())"),
}

RESULTS = {
    "a view like the input": row("x.contiguous().view(-1).view(x.shape), m.body(x)"),
    "a view like another result": row("y = m.body(x); return y, y.view(-1).view(y.shape)"),
    "a tuple": row("m.body(x), m.a(x)"),
    "a list": row("[m.body(x), m.a(x)]"),
    "a list of the caller's": row("[m.body(x), []]", call="(out := m(x), out[1].append(1))[0]"),
    "a dict of the caller's": row("{'y': m.body(x), 'd': {}}",
        call="(out := m(x), out['d'].update(k=1))[0]"),
    "a list that the module keeps": row("m.l = [m.body(x)]; return m.l"),
    "a nested structure": row("{'y': [m.body(x), (m.a(x), None, 3, 'word')], 2: {}}"),
    "an OrderedDict": row("collections.OrderedDict(z=m.body(x), y=m.a(x))"),
    "a defaultdict": row("d = collections.defaultdict(list); d['y'].append(m.body(x)); return d"),
    "a dict with attributes": row("y = Maps(y=m.body(x)); y.name = f'{x.mean():.2f}'; return y"),
    "a namedtuple": row("Pair(m.body(x), 2)"),
    "a structure of torch's": row("m.body(x).max(1)"),
    "a dataclass": row("Options(m.body(x))"),
    "a dataclass beside a tensor": row("{'y': m.body(x), 'o': Options(m.body(x) * 2)}"),
    "an object with slots": row("y = Slotted(); y.scale = m.body(x); return y"),
    "a namespace": row("types.SimpleNamespace(y=m.body(x), k=1)"),
    "a deque": row("collections.deque([m.body(x), m.a(x)])"),
    "a distribution": row("torch.distributions.Normal(m.body(x), 1.0)"),
    "a function": row("y = m.body(x); return lambda: y * 2", call="m(x)()"),
    "an iterator": row("iter([m.body(x), m.a(x)])", call="[*m(x)]"),
    "a generator": row("yield m.a(x)\nyield m.body(x)"),
    "an array": row("m.body(x).numpy()"),
    "an array beside a tensor": row("m.body(x), m.body(x).mean((1, 2, 3)).numpy()"),
    "an array of the same memory": row("y = m.body(x); return y, y.numpy()"),
    "a number of NumPy": row("m.body(x), x.numpy().max()"),
    "a number": row("m.body(x), x.mean().item(), 3, 3.0, True"),
    "only a number": row("m.body(x).mean().item()"),
    "a shape": row("y = m.body(x); return y, y.shape, y.dtype, y.device"),
    "nothing": row("m.feat = m.body(x)"),
    "None beside a tensor": row("m.body(x), None"),
    "a constant": row("m.body(x), torch.arange(3.0)"),
    "only a constant": row("torch.ones(2, 2)"),
    "a constant of the input's size": row("m.body(x), x.new_zeros(len(x))",
        before="x = draw(1 + i // 3, 3, 16, 16)"),
    "a buffer": row("m.body(x), m.buf"),
    "a view of a buffer": row("m.body(x), m.k[1:]", init="m.register_buffer('k', torch.ones(3))",
        change="m.k.add_(1)"),
    "a parameter": row("m.body(x), m.a.bias"),
    "a view of a parameter": row("m.body(x), m.a.bias[2:4]"),
    "all parameters": row("m.body(x), dict(m.named_parameters())"),
    "the input": row("x"),
    "the input beside a tensor": row("m.body(x), x"),
    "a view of the input": row("m.body(x), x[:, 1:]"),
    "the input, detached": row("m.body(x), x.detach()"),
    "the input, reshaped or copied": row("m.body(x), x.reshape(2, -1), x.contiguous()",
        before="x = x.mT if i in (2, 4) else x"),
    "the input, in a list": row("m.body(x), [x, x]"),
    "no copy of the input": row("m.body(x), x.float(), x.to(x.dtype), F.dropout(x, 0.5, False)"),
    "one tensor twice": row("y = m.body(x); return y, y"),
    "one list twice": row("y = [m.body(x)]; return y, y"),
    "a tensor and a view of it": row("y = m.body(x); return y, y.view(-1)"),
    "a tensor and its copy": row("y = m.body(x); return y, y.clone()"),
    "a tensor and its activation": row("y = m.body(x); return y, F.relu(y), y.detach()"),
    "a tensor and itself in place": row("y = m.body(x); return y, y.relu_()"),
    "overlapping parts": row("y = m.body(x); return y[:, :5], y[:, 3:]"),
    "parts": row("m.body(x).chunk(2, 1)"),
    "a split": row("m.body(x).split([2, 6], 1)"),
    "each image": row("m.body(x).unbind()"),
    "transposed": row("m.body(x).mT"),
    "permuted": row("m.body(x).permute(0, 2, 3, 1)"),
    "every second": row("m.body(x)[:, ::2]"),
    "expanded": row("m.body(x).mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)"),
    "tokens": row("m.tokens(x)"),
    "in channels last": row("m.body(x).contiguous(memory_format=torch.channels_last)"),
    "for a caller who needs it contiguous": row("m.body(x)", call="m(x).view(2, -1)"),
    "strides of convolutions": row("m.a(x), m.c(m.a(x)), F.relu(m.a(x))"),
    "a map of one pixel": row("F.adaptive_avg_pool2d(m.body(x), 1), m.body(x).mean((2, 3), True)"),
    "interpolated": row("F.interpolate(m.body(x), scale_factor=2, mode='bilinear')"),
    "sparse": row("m.body(x).relu().to_sparse()"),
    "a sparse constant": row("m.body(x), torch.eye(3).to_sparse()"),
    "complex": row("torch.fft.rfft2(m.body(x))"),
    "mask": row("m.body(x), x > 0"),
    "whole numbers": row("m.body(x), x.argmax(1)"),
    "another dtype": row("m.body(x).double(), m.body(x).bfloat16()"),
    "an empty tensor": row("m.body(x), torch.empty(0), m.body(x)[:, 8:]"),
    "no dimensions": row("m.body(x).mean()"),
    "a tensor with a note": row("y = m.body(x); y.note = f'{x.mean():.2f}'; return y"),
    "a new Parameter": row("nn.Parameter(m.body(x), requires_grad=False)"),
    "a subclass of Tensor": row("m.body(x).as_subclass(Own)"),
    "a layer": row("m.body(x), m.a"),
    "itself": row("m.k = m.body(x); return m"),
    "a class": row("m.body(x), type(x), torch.relu"),
}

# Global modes, which forward may ask for or set.
_ASKS = "m.body(x) * (2 if {}() else 3)"
MODES = {
    "inference_mode, then no_grad": row(_ASKS.format("torch.is_inference_mode_enabled"),
        mode="(torch.inference_mode, torch.no_grad)[i // 3]()"),
    "no_grad, then inference_mode": row(_ASKS.format("torch.is_inference_mode_enabled"),
        mode="(torch.no_grad, torch.inference_mode)[i // 3]()"),
    "enable_grad, then no_grad": row(_ASKS.format("torch.is_grad_enabled"),
        mode="(torch.enable_grad, torch.no_grad)[i // 3]()"),
    "no_grad, then enable_grad": row(_ASKS.format("torch.is_grad_enabled"),
        mode="(torch.no_grad, torch.enable_grad)[i // 3]()"),
    "all in turns": row("m.body(x) + m.t", init="m.t = torch.ones(1)",
        mode="(torch.inference_mode, torch.no_grad, torch.enable_grad)[i % 3]()", calls=9),
    "autocast": row("m.body(x)", mode="torch.autocast('cpu', torch.bfloat16, enabled=i // 3 == 1)",
        calls=9, within=0.03),
    "autocast at first": row("m.body(x)",
        mode="torch.autocast('cpu', torch.bfloat16, enabled=i < 3)", within=0.03),
    "autocast inside": row("with torch.autocast('cpu', torch.bfloat16):\n    return m.body(x)",
        within=0.03),
    "autocast, asked for": row("m.body(x) * (2 if torch.is_autocast_enabled('cpu') else 3)",
        mode="torch.autocast('cpu', torch.bfloat16, enabled=i // 3 == 1)", calls=9, within=0.03),
    "the default dtype": row("m.body(x), torch.zeros(1), torch.tensor(0.5)",
        change="is_single = torch.get_default_dtype() == torch.float32; "
        "torch.set_default_dtype(torch.float64 if is_single else torch.float32)"),
    "deterministic algorithms": row(_ASKS.format("torch.are_deterministic_algorithms_enabled"),
        change="torch.use_deterministic_algorithms("
        "not torch.are_deterministic_algorithms_enabled())"),
    "threads": row("m.body(x) * torch.get_num_threads()",
        change="torch.set_num_threads(3 - torch.get_num_threads())"),
    "set inside": row("torch.set_grad_enabled(False); return m.body(x)",
        mode="torch.enable_grad()"),
    "the default dtype, set inside": row(
        "torch.set_default_dtype(torch.float64); return m.body(x), torch.zeros(1)"),
    "threads, set inside": row("torch.set_num_threads(2); return m.body(x)"),
    "no_grad inside": row("with torch.no_grad(): y = m.body(x)\nreturn y, x * 2",
        before="x.requires_grad_()", mode="torch.enable_grad()"),
    "inference_mode inside": row("with torch.inference_mode(): return m.body(x)"),
    "enable_grad inside": row("""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(m.body(x).square().sum(), x)
        """, mode="torch.no_grad()"),
    "functions that a caller watches": row("m.body(x)", init="log = []",
        mode="Watch(log) if i > 2 else torch.no_grad()"),
    "operators that a caller watches": row("F.softmax(m.body(x), 1)", init="log = []",
        mode="WatchOperators(log) if i > 2 else torch.no_grad()"),
    "a default device": row("m.body(x) + torch.ones(1)", mode="torch.device('cpu')"),
    "vmap": row("m.body(x)", call="torch.vmap(m)(torch.stack([x, x])) if i > 2 else m(x)"),
    "gradients of a function": row("m.body(x)",
        call="torch.func.grad(lambda x: m(x).square().sum())(x) if i > 2 else m(x)"),
    "other weights for a call": row("m.body(x)",
        call="torch.func.functional_call(m, {'a.bias': torch.full((8,), float(i))}, (x,)) if "
        "i % 3 == 2 else m(x)", calls=9),
    "forward without hooks": row("m.body(x)",
        init="log = []; h = m.register_forward_hook(lambda *_: log.append(1))",
        call="m.forward(x) if i % 2 else m(x)", calls=8),
    "another method": row("m.body(x)", call="m.body(x) if i % 2 else m(x)", calls=8),
    "a part": row("m.body(x)", call="m.a(x) if i % 2 else m(x)", calls=8),
    "in another network": row("m.body(x)", then="outer = nn.Sequential(m, nn.ReLU())",
        call="outer(x)"),
    "itself again": row("m(x / 2, depth - 1) + 1 if depth else m.body(x)", takes="x, depth=2"),
    "in another thread": row("m.body(x)", call="aside(lambda: m(x)) if i % 2 else m(x)", calls=8),
}

# The layout of memory, and writes to parts of tensors.
MEMORY = {
    "as_strided": row("m.body(x).as_strided((2, 8, 4, 4), (2048, 256, 16, 1), 3)"),
    "as_strided of a copy": row("F.relu(m.body(x)).clone().as_strided((16,), (5,))"),
    "as_strided of the input": row("m.body(x.as_strided((2, 3, 8, 8), (768, 256, 32, 2)))",
        before="x = x.mT.contiguous().mT if i in (2, 4) else x"),
    "as_strided, written": row(
        "y = m.body(x); y.as_strided((2, 16), (2048, 17)).zero_(); return y * 2"),
    "strides as numbers": row("y = m.body(x); return y * y.stride(1)"),
    "strides as a branch": row("y = m.body(x); return y if y.is_contiguous() else y * 2"),
    "an offset": row("m.body(x) * (1 + x.storage_offset())", before="x = draw(4, 3, 16, 16)[2:]"),
    "a view that needs contiguous memory": row("m.body(x).view(2, -1) * 2"),
    "an address": row(
        "y = m.body(x); return y * (2 if y.view(-1).data_ptr() == y.data_ptr() else 3)"),
    "bytes of a view": row("m.body(x).view(torch.int32).view(torch.float32) * 2"),
    "a view": row("y = m.body(x); y.view(-1)[::3] = 0; return y * 2"),
    "a slice": row("y = m.body(x); y[:, :2] = x[:, :2]; return y * 2"),
    "a slice multiplied": row("y = m.body(x); y[..., 1::2].mul_(2); return y + 1"),
    "a slice of a slice": row("y = m.body(x); y[:, 2:][:, :3] += 1; return y * 2"),
    "a transposed view": row("y = m.body(x); y.mT[:, 0].add_(x[:, 0]); return y * 2"),
    "one part from another": row("y = m.body(x); k, l = y.chunk(2, 1); k.mul_(l); return y, k"),
    "a view made before": row("y = m.body(x); v = y[:, 0]; y.mul_(2); return v + 1, y"),
    "a copy made before": row("y = m.body(x); v = y.clone(); y.mul_(2); return v + 1, y"),
    "an activation in place": row("y = m.a(x); z = m.act(y); return m.c(z) + y",
        init="m.act = nn.ReLU(inplace=True)"),
    "the input's activation in place": row("m.body(F.relu(x, inplace=True)) + x.mean()"),
    "a shortcut in place": row("y = m.body(x); y += m.a(x); return y"),
    "a detached view": row("y = m.body(x); y.detach().mul_(2); return y + 1"),
    "data": row("y = m.body(x); y.data.add_(1); return y * 2"),
    "new data": row("y = m.body(x); v = y[:, 0]; y.data = y.data * 2; return y + 1, v"),
    "where indices are": row("y = m.body(x); y[:, [0, 3]] = 0; "
        "y.index_fill_(1, torch.tensor([1]), 1); return y * 2"),
    "where values are": row("y = m.body(x); y[x[:, :1].expand_as(y) > 0] = 0; return y * 2"),
    "masked": row("y = m.body(x); y.masked_fill_(x[:, :1] > 0, -1.0); return y * 2"),
    "scattered": row("y = m.body(x); y.scatter_(1, x.argsort(1), x); return y * 2"),
    "an empty tensor, filled": row("""
        y = torch.empty(2, 16, 16, 16)
        y[:, :8] = m.body(x)
        torch.mul(m.a(x), 2, out=y[:, 8:])
        return y * 2
        """),
    "windows": row("y = m.body(x); y.unfold(2, 2, 2)[..., 0].zero_(); return y * 2"),
    "rolled and padded, as in torchvision's Swin V2": row("""
        y = F.pad(m.body(x), (0, 2, 0, 2)).roll((-1, -1), (2, 3))
        mask = y.new_zeros(y.shape[2:])
        mask[-2:] = 1
        mask[:, -2:] = 2
        return y + mask
        """),
    "a loop of writes": row("y = m.body(x)\nfor k in range(8): y[:, k] += k\nreturn y * 2"),
}

_MASK = "k = torch.arange(16).expand(2, 16) >= 10 + i % 3"
_MHA = "m.t = nn.MultiheadAttention(8, 2, batch_first=True)"
_LAYER = "nn.TransformerEncoderLayer(8, 2, 16, batch_first=True"
ATTENTION = {
    "nn.MultiheadAttention": row("t = m.tokens(x); return m.t(t, t, t)", init=_MHA),
    "without weights": row("t = m.tokens(x); return m.t(t, t, t, need_weights=False)",
        init=_MHA),
    "each head's weights": row("t = m.tokens(x); return m.t(t, t, t, average_attn_weights=False)",
        init=_MHA),
    "sequence first": row("t = m.tokens(x); return m.t(t, t[:1], t[:1], need_weights=False)[0]",
        init="m.t = nn.MultiheadAttention(8, 2)", before="x = draw(3, 3, 16, 16)"),
    "keys masked": row("t = m.tokens(x); return m.t(t, t, t, key_padding_mask=k)", takes="x, k",
        before=_MASK, call="m(x, k)", init=_MHA),
    "pairs masked": row("t = m.tokens(x); return m.t(t, t, t, attn_mask=k, need_weights=False)",
        takes="x, k", before="k = draw(16, 16)", call="m(x, k)",
        init=_MHA),
    "other keys": row("t = m.tokens(x); return m.t(t, F.relu(t), m.a(x).flatten(2).mT[:, :16])",
        init=_MHA),
    "scaled_dot_product_attention": row(
        "t = m.tokens(x)[:, None]; return F.scaled_dot_product_attention(t, t, t)"),
    **{
        f"nn.TransformerEncoderLayer{options}{', keys masked' * masked}": row(
            f"m.t(m.tokens(x){', src_key_padding_mask=k' * masked})",
            takes="x, k=None",
            before=_MASK,
            call="m(x, k)",
            init=f"m.t = {_LAYER}{options})",
        )
        for options in ("", ", norm_first=True", ", activation='gelu'")
        for masked in (False, True)
    },
    "nn.TransformerEncoder": row("m.t(m.tokens(x), src_key_padding_mask=k)", takes="x, k=None",
        before=_MASK, call="m(x, k)", init=f"m.t = nn.TransformerEncoder({_LAYER}), 2)"),
    "nn.TransformerDecoderLayer": row("t = m.tokens(x); return m.t(t, t * 2)",
        init="m.t = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)"),
    "weights of attention, changed": row(
        "t = m.tokens(x); return m.t(t, t, t, need_weights=False)[0]",
        init=_MHA,
        change="m.t.in_proj_weight.mul_(2)"),
}

ERRORS = {
    "of a size": row("if len(x) == 3: raise ValueError(f'not {len(x)} images')\nreturn m.body(x)",
        before="x = draw(3 if i in (3, 5) else 2, 3, 16, 16)", calls=8),
    "of values": row("if x.mean() > 0: raise ValueError(f'mean {x.mean():.2f}')\nreturn m.body(x)",
        calls=8),
    "of torch": row("m.body(x)", before="x = draw(2, 4 if i in (3, 5) else 3, 16, 16)", calls=8),
    "of torch at first": row("m.body(x)", before="x = draw(2, 4 if i < 2 else 3, 16, 16)"),
    "of Python": row("m.body(x)", before="x = None if i in (3, 5) else x", calls=8),
    "of arguments": row("m.body(x)", call="m() if i in (3, 5) else m(x)", calls=8),
    "of unknown arguments": row("m.body(x)", call="m(x, k=2) if i in (3, 5) else m(x)", calls=8),
    "of another class": row("""
        m.n += 1
        if m.n == 4: raise Refusal('no more')
        return m.body(x)
        """, init="m.n = 0\nclass Refusal(Exception): pass"),
    "an interruption": row("if flag: raise Stop('now')\nreturn m.body(x)", init="flag = False",
        before="flag = i in (0, 4)"),
    "after a write": row("x.mul_(2); return m.body(x)",
        before="x = draw(2, 4 if i in (3, 5) else 3, 16, 16)", calls=8),
    "in a hook": row("m.body(x)", init="""
        def hook(layer, args, out):
            if len(out) == 3: raise KeyError('three')
        m.a.register_forward_hook(hook)
        """, before="x = draw(3 if i in (3, 5) else 2, 3, 16, 16)", calls=8),
    "always": row("m.body(x); raise RuntimeError('never right')"),
    "of an assertion": row("assert x.mean() > 0, 'not positive'; return m.body(x)", calls=8),
    "of an attribute": row("m.body(x) * m.missing"),
    "that end an iteration": row("m.body(x) * next(k)", init="k = iter([1, 2, 3])"),
}

# Errors that don't leave forward.
CAUGHT = {
    "an error": row("""
        try:
            return m.body(x).view(-1, 7)
        except RuntimeError:
            return m.body(x) * 2
        """),
    "an error of a value": row("""
        try:
            y = {True: 2.0}[bool(x.mean() > 0)]
        except KeyError as error:
            y = 3.0
        return m.body(x) * y
        """, calls=8),
    "a state restored": row("""
        m.k *= 2
        try:
            return m.body(x) * m.k
        finally:
            m.k = 1.0
        """, init="m.k = 1.0"),
}

KINDS = {
    "nn.Sequential": row(None,
        init="m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())"),
    "nn.Sequential with hooks": row(None,
        init="m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()); log = []\n"
        "m[0].register_forward_hook(lambda m, args, out: log.append(len(out)))"),
    "one layer": row(None, init="m = nn.Conv2d(3, 8, 3)"),
    "no layers": row(None, init="m = nn.ReLU(inplace=True)"),
    "an identity": row(None, init="m = nn.Identity()"),
    "a ScriptModule": row(None,
        init="m = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval())"),
    "a ScriptModule inside": row("m.k(m.body(x))",
        init="m.k = torch.jit.script(nn.Conv2d(8, 8, 1).eval())"),
    "a traced layer inside": row("m.k(m.body(x))",
        init="m.k = torch.jit.trace(nn.Conv2d(8, 8, 1).eval(), draw(2, 8, 16, 16))"),
    "lazy layers": row(None,
        init="m = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())"),
    "a lazy layer inside": row("m.k(m.body(x))", init="m.k = nn.LazyConv2d(4, 1)"),
    "a class whose subclasses need an argument": row(None, init="""
        class Tagged(nn.Sequential):
            def __init_subclass__(cls, *, tag):
                cls.tag = tag
        m = Tagged(nn.Conv2d(3, 8, 3), nn.ReLU())
        """),
    "a class that forbids subclasses": row(None, init="""
        class Final(nn.Sequential):
            def __init_subclass__(cls):
                raise TypeError('final')
        m = Final(nn.Conv2d(3, 8, 3), nn.ReLU())
        """),
    "a class with a metaclass": row(None, init="""
        class Other(nn.Sequential, metaclass=type('Meta', (type,), {})): pass
        m = Other(nn.Conv2d(3, 8, 3), nn.ReLU())
        """),
    "__call__ of its own": row(None, init="""
        class Other(nn.Conv2d):
            def __call__(m, x): return super().__call__(x) * 2
        m = Other(3, 8, 3)
        """),
    "__getattr__ of its own": row("m.body(x) * m.k", init="""
        def get(m, name):
            return found if name == 'k' else nn.Module.__getattr__(m, name)
        Net.__getattr__ = get; found = 1.0
        """, change="found += 1"),
    "__setattr__ of its own": row("m.k = len(x); return m.body(x)", init="""
        def assign(m, name, value):
            if name == 'k': log.append(value)
            nn.Module.__setattr__(m, name, value)
        Net.__setattr__ = assign; log = []
        """),
    "a property": row("m.body(x) * m.k", init="Net.k = property(lambda m: len(log)); log = [0]",
        change="log.append(1)"),
    "forward in the constructor": row("m.body(x)",
        init="m.forward = m.first = lambda x: m.a(x) * 2"),
    "a decorated forward": row("m.body(x)", init="Net.forward = torch.no_grad()(Net.forward)",
        before="x.requires_grad_()", mode="torch.enable_grad()"),
    "made in inference mode": row(None,
        init="with torch.inference_mode(): m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())"),
    "float64": row("m.body(x)", init="m.double()", before="x = x.double()"),
    "bfloat16": row("m.body(x)", init="m.bfloat16()", before="x = x.bfloat16()"),
    "fused twice": row("m.body(x)", then="m = fuse(m)"),
    "fused again between calls": row("m.body(x)", change="m.a.weight.mul_(2); fuse(m)"),
    "fused in a network": row("m.body(x)", then="m = fuse(nn.Sequential(m, nn.ReLU()))"),
    "one layer at two places": row("m.c(m.c(m.a(x)))", change="m.c.weight.mul_(2)"),
    "tied weights": row("m.k(m.body(x))", init="m.k = nn.Conv2d(8, 8, 3); m.k.weight = m.c.weight",
        change="m.c.weight.mul_(2)"),
    "moved between dtypes": row("m.body(x)", change="m.to(torch.float64).to(torch.float32)"),
    "a copy of it": row("m.body(x)", init="old = None",
        before="if i == 3: old, m = m, copy.deepcopy(m)\nif i > 4: m.a.weight.mul_(2)",
        call="m(x), old(x) if old else None", calls=9),
    "a pickle of it": row("m.body(x)", init="old = None",
        before="if i == 3: old, m = m, pickle.loads(pickle.dumps(m))\n"
        "if i > 4: old.a.weight.mul_(2)",
        call="m(x), old(x) if old else None", calls=9),
    "a copy of it, before the first call": row("m.body(x)", then="m = copy.deepcopy(m)"),
    "its weights in another module": row("m.body(x)",
        then="new = Net(); new.load_state_dict(m.state_dict())",
        call="m(x), new.eval().requires_grad_(False)(x)"),
    "a recurrent layer": row("m.k(m.tokens(x))", init="m.k = nn.GRU(8, 4, batch_first=True)"),
    "an embedding": row("m.k(x.argmax(1))", init="m.k = nn.Embedding(3, 4)"),
    "a volume": row(None,
        init="m = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU())",
        before="x = draw(1, 3, 5, 6, 7)"),
}

# fmt: on

ROWS = {
    f"{group}: {name}": parts
    for group, rows in {
        **{"state": STATE, "chance": CHANCE, "value": VALUES, "change": CHANGES},
        **{"argument": ARGUMENTS, "result": RESULTS, "mode": MODES, "memory": MEMORY},
        **{"attention": ATTENTION, "error": ERRORS, "caught": CAUGHT, "kind": KINDS},
    }.items()
    for name, parts in rows.items()
}


def _cases() -> Iterator[Any]:
    """Each row with its changes at some times, and in some modes; most of them are slow tests."""
    for name, parts in ROWS.items():
        given = {"raises": name.startswith("error"), "names": NAMES}
        cases: list[tuple[str, tuple[int, ...]]] = [("inference_mode", ()), ("no_grad", ())]
        if "change" in parts:  # before call 4; before 2, 3 and 6; and before each of these alone
            given["calls"] = 8
            cases = [("no_grad", (3,)), ("inference_mode", (1, 2, 5))]
            cases += [("no_grad", (i,)) for i in (1, 2, 5)]
        for number, (mode, when) in enumerate(cases):
            if when or number == 0 or "mode" not in parts:
                case = {"mode": f"torch.{mode}()", "when": when, **given, **parts}
                words = [name, *(["mode"] if "mode" in parts else [mode]), *(i + 1 for i in when)]
                is_quick = number == 0 or number == 1 and bool(when)
                marks = () if is_quick else pytest.mark.slow
                yield pytest.param(case, id=" ".join(map(str, words)), marks=marks)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("parts", [*_cases()])
def test_law(parts: dict[str, Any], law: Callable[..., None]) -> None:
    law(**parts)


RUNS: list[int] = []


@torch.library.custom_op("law::counted", mutates_args=(), schema="(Tensor x) -> Tensor")
def counted(x):
    RUNS.append(len(x))
    return x * 2


counted.register_fake(torch.empty_like)

for _name in ("positive", "unknown"):
    torch.library.define(f"law::{_name}", "(Tensor x) -> Tensor")
    torch.library.impl(f"law::{_name}", "cpu")(lambda x: x[x > 0])


@torch.library.register_fake("law::positive")
def positive(x: Tensor) -> Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


# What comes after an operator that counts how often it runs; most of it can't be recorded.
ONCE = {
    "nothing": "",
    "a branch": "y = y if y.mean() > 0 else -y",
    "a number": "y = y * y.mean().item()",
    "NumPy": "y = torch.from_numpy(np.tanh(y.numpy()))",
    "a state": "m.n = getattr(m, 'n', 0) + 1",
    "a buffer": "m.buf.add_(1)",
    "a write to the input": "x.mul_(2)",
    "a random number": "y = y + torch.rand(1)",
    "a layout": "y = y.as_strided((4, 4), (16, 1))",
    "a sparse tensor": "y = y.to_sparse()",
    "an object": "y = Options(y)",
    "a size of values": "y = y[y > 0]",
    "a nested tensor": "y = torch.nested.as_nested_tensor([*y]).to_padded_tensor(0.0)",
    "another operator": "y = torch.ops.law.counted(y)",
    "an error": "raise ValueError('never right')",
    "an error at times": "if len(RUNS) == 4: raise ValueError('four')",
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("after", ONCE)
def test_nothing_runs_twice(after: str, law: Callable[..., None]) -> None:
    """Whether recording, rewriting or a replay fails, and whether the forward has effects."""
    names = {"counted": counted, "Options": Options, "RUNS": RUNS}
    law(
        f"y = m.body(counted(x))\n{ONCE[after]}\nreturn y",
        init="RUNS.clear(); runs = RUNS",
        raises="error" in after,
        names=names,
    )


@pytest.mark.parametrize("size", [None, 16, (3, 12, 20)])
def test_explaining_changes_nothing(size: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    plain = copy.deepcopy(model).eval()
    fused, x = backbones.fuse(model), torch.randn(2, 3, 16, 16)
    for _ in range(3):
        random = torch.get_rng_state()
        assert "Sequential" in str(backbones.explain(fused, size, repeats=2))
        assert torch.equal(torch.get_rng_state(), random)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, fused.state_dict().values(), plain.state_dict().values()))


def test_int8_without_layers_to_quantise() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.conv.weight / self.conv.weight.std(), self.conv.bias)

    torch.manual_seed(0)
    model, x = Standardised(), torch.randn(2, 3, 16, 16)
    plain = copy.deepcopy(model)
    fused = backbones.fuse(model, torch.int8, calibrate=[x])
    x = x.to(fused.conv.weight.dtype)  # bfloat16 on a CPU with kernels in int8
    with torch.no_grad():
        expected = plain.to(x.dtype)(x).float()
        for _ in range(4):
            torch.testing.assert_close(fused(x).float(), expected, rtol=0, atol=0.05)


def test_attention_with_heads_of_no_channels() -> None:
    q = torch.zeros(1, 9, 9, 2, 0)
    assert na2d(q, q, q, kernel_size=3).shape == q.shape
