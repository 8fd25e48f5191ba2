"""Neighborhood attention by brute force in float64, random cases for it, and the comparison.

Nothing here uses the code under test: the window of each query is enumerated from the definition,
and the attention is a dense masked softmax over all pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ops.neighborhood import na1d, na2d, na3d

NA: dict[int, Callable] = {1: na1d, 2: na2d, 3: na3d}

# Largest error relative to max(1, largest true value), for outputs and gradients.
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (5e-6, 2e-5),
    torch.bfloat16: (8e-3, 2e-2),
    torch.float16: (1e-3, 4e-3),
}


@dataclass(frozen=True)
class Case:
    """One call: sizes and parameters, everything except the tensors' values."""

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dim: int = 8
    value_dim: int = 8
    extra: int = 0  # number of additional keys
    has_rpb: bool = False
    scale: float | None = None
    packed: bool = False  # query, key and value are strided views
    return_lse: bool = True
    seed: int = 0

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def arguments(self) -> dict:
        """Keyword arguments of na1d, na2d and na3d."""
        names = ("kernel_size", "stride", "dilation", "is_causal", "scale")
        return {name: getattr(self, name) for name in names}


@dataclass
class Inputs:
    """The tensors of a case, named like the arguments of na1d, na2d and na3d."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    rpb: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(**{name: function(tensor) for name, tensor in self.present().items()})


@dataclass(frozen=True)
class Limits:
    """Limits of the random cases; narrow them for a backend that does not support everything."""

    ranks: tuple[int, ...] = (1, 2, 3)
    dims: tuple[int, ...] = (1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 32, 33, 48, 64, 80, 127, 128)
    max_size: dict[int, int] = field(default_factory=lambda: {1: 70, 2: 15, 3: 7})
    value_dim_differs: bool = True
    grouped: bool = True
    extra: bool = True
    rpb: bool = True


def random_case(seed: int, limits: Limits | None = None) -> Case:
    """A random case, which depends only on the seed and is the same on every machine."""
    limits = limits or Limits()
    rng = random.Random(seed)
    rank = rng.choice(limits.ranks)
    axes = [_random_axis(rng, limits.max_size[rank]) for _ in range(rank)]
    size, kernel_size, stride, dilation, is_causal = (tuple(a) for a in zip(*axes, strict=True))
    dim = rng.choice(limits.dims)
    kv_heads = rng.choice((1, 1, 2, 3))
    differs = limits.value_dim_differs and rng.random() < 0.25
    return Case(
        size,
        kernel_size,
        stride,
        dilation,
        is_causal,
        batch=rng.choice((1, 1, 2, 3)),
        heads=kv_heads * (rng.choice((2, 3)) if limits.grouped and rng.random() < 0.25 else 1),
        kv_heads=kv_heads,
        dim=dim,
        value_dim=rng.choice(limits.dims) if differs else dim,
        extra=rng.choice((1, 3, 18)) if limits.extra and rng.random() < 0.25 else 0,
        has_rpb=limits.rpb and rng.random() < 0.3,
        scale=rng.choice((None, None, 0.3, -0.5, 0.0)),
        packed=rng.random() < 0.4,
        return_lse=rng.random() < 0.5,
        seed=seed,
    )


def _random_axis(rng: random.Random, max_size: int) -> tuple[int, int, int, int, bool]:
    size = rng.choice((1, 2, max_size, rng.randint(1, max_size), rng.randint(1, max_size)))
    kernel_size = rng.choice((1, size, rng.randint(1, size), rng.randint(1, min(size, 7))))
    most = size // kernel_size
    dilation = rng.choice((1, 1, most, rng.randint(1, most)))
    stride = rng.choice((1, 1, kernel_size, rng.randint(1, kernel_size)))
    return size, kernel_size, stride, dilation, rng.random() < 0.3


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"
) -> Inputs:
    """Normal random tensors; with ``packed``, views into one wider tensor with a permuted map."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def mapped(heads: int, dim: int) -> Tensor:
        if not case.packed:
            return normal(case.batch, *case.size, heads, dim)
        wide = normal(case.batch, heads, *case.size, dim + 3)
        return wide.narrow(-1, 2, dim).movedim(1, -2)

    inputs = Inputs(
        mapped(case.heads, case.dim),
        mapped(case.kv_heads, case.dim),
        mapped(case.kv_heads, case.value_dim),
    )
    if case.extra:
        inputs.additional_keys = normal(case.batch, case.extra, case.kv_heads, case.dim)
        inputs.additional_values = normal(case.batch, case.extra, case.kv_heads, case.value_dim)
    if case.has_rpb:
        inputs.rpb = normal(case.heads, *(2 * k - 1 for k in case.kernel_size))
    return inputs


def normal_inputs(
    *size: int, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Query, key and value (2, *size, heads, dim), normally distributed."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *size, heads, dim, generator=generator).to(dtype) for _ in range(3)]


def window(
    i: int, n: int, kernel_size: int, stride: int, dilation: int, is_causal: bool
) -> list[int]:
    """Positions that query i sees on an axis of length n, in order."""
    g, p = i % dilation, i // dilation
    group_size = math.ceil((n - g) / dilation)
    if is_causal:
        leader = min((p // stride) * stride + stride - 1, group_size - 1)
        places = range(max(0, leader - kernel_size + 1), p + 1)
    else:
        leader = min((p // stride) * stride + stride // 2, group_size - 1)
        start = min(max(leader - kernel_size // 2, 0), group_size - kernel_size)
        places = range(start, start + kernel_size)
    return [j * dilation + g for j in places]


def brute_force(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Out (B, *S, H, D_v) and lse (B, *S, H), from all pairs of positions, in the inputs' dtype."""
    device = inputs.query.device
    # Whether the first position of a pair sees the second, and the entry of the flattened rpb.
    mask = torch.ones(1, 1, dtype=torch.bool)
    entry = torch.zeros(1, 1, dtype=torch.long)
    for axis in zip(
        case.size, case.kernel_size, case.stride, case.dilation, case.is_causal, strict=True
    ):
        size, kernel_size, _, dilation, _ = axis
        seen = torch.zeros(size, size, dtype=torch.bool)
        for i in range(size):
            seen[i, window(i, *axis)] = True
        apart = torch.arange(size) - torch.arange(size)[:, None]
        along = torch.where(seen, apart // dilation + kernel_size - 1, 0)
        whole = len(mask) * size  # positions on this axis and those before it
        mask = (mask[:, None, :, None] & seen[:, None]).reshape(whole, whole)
        entry = entry[:, None, :, None] * (2 * kernel_size - 1) + along[:, None]
        entry = entry.reshape(whole, whole)
    entry *= mask

    # (B, *S, H, D) → (B, H, n, D); a key head serves heads // kv_heads query heads.
    def dense(tensor: Tensor, repeats: int) -> Tensor:
        return tensor.flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, dim=1)

    repeats = case.heads // case.kv_heads
    query, key, value = (
        dense(inputs.query, 1),
        dense(inputs.key, repeats),
        dense(inputs.value, repeats),
    )
    scale = case.dim**-0.5 if case.scale is None else case.scale
    scores = query @ key.transpose(-2, -1) * scale
    if inputs.rpb is not None:
        scores = scores + inputs.rpb.flatten(1)[:, entry.to(device)]
    scores = scores.masked_fill(~mask.to(device), -math.inf)
    if inputs.additional_keys is not None and inputs.additional_values is not None:
        extra = dense(inputs.additional_keys, repeats)
        scores = torch.cat([scores, query @ extra.transpose(-2, -1) * scale], dim=-1)
        value = torch.cat([value, dense(inputs.additional_values, repeats)], dim=-2)
    out = scores.softmax(-1) @ value
    shape = (case.batch, *case.size, case.heads)
    return (
        out.transpose(1, 2).reshape(*shape, case.value_dim),
        scores.logsumexp(-1).transpose(1, 2).reshape(shape),
    )


# A call whose tiles share keys that not all of their queries see, with bias and additional keys.
UNUSUAL = Case(
    (9, 11), (3, 4), (1, 2), (2, 1), (False, True), heads=4, kv_heads=2, extra=2, has_rpb=True
)
UNUSUAL_SCORES = ("nan key", "nan additional key", "infinite key", "infinite keys", "hiding rpb")


def unusual_inputs(kind: str, device: str | torch.device = "cpu") -> Inputs:
    """Inputs of :data:`UNUSUAL`, modified by ``kind`` so that some scores are NaN or infinite."""
    inputs = make_inputs(UNUSUAL, torch.float32, device)
    assert inputs.additional_keys is not None and inputs.rpb is not None
    if kind == "nan key":
        inputs.key[:, 4, 5, 0, 3] = math.nan
    elif kind == "nan additional key":
        inputs.additional_keys[0, 1, 1, 0] = math.nan
    elif kind == "infinite key":  # with either sign, depending on the query
        inputs.key[:, 4, 5:7, 0, 3] = math.inf
        inputs.key[:, 4, 6, 0, 5] = math.nan
    elif kind == "infinite keys":  # all scores of some queries are -inf
        for keys in (inputs.key, inputs.additional_keys):
            keys[..., 0] = math.inf
    else:
        assert kind == "hiding rpb"
        inputs.rpb[:, :3] = -math.inf
        inputs.additional_keys = inputs.additional_values = None
    return inputs


def assert_lse_of_unusual_scores(
    kind: str, backend: str | None, device: str | torch.device = "cpu"
) -> None:
    """Check that lse and output are NaN, infinite and finite in the same places as torch's."""
    inputs = unusual_inputs(kind, device)
    arguments = {**UNUSUAL.arguments, "return_lse": True, "backend": backend}
    got = NA[UNUSUAL.rank](**inputs.present(), **arguments)
    true = brute_force(UNUSUAL, inputs.map(lambda t: t.double()))
    torch.testing.assert_close(
        [tensor.double() for tensor in got], list(true), rtol=1e-5, atol=1e-5, equal_nan=True
    )


def error(got: Tensor, true: Tensor) -> float:
    """Largest absolute error relative to max(1, largest true value)."""
    assert got.shape == true.shape, (got.shape, true.shape)
    if true.numel() == 0:
        return 0.0
    largest = max(1.0, true.abs().max().item())
    return (got.to(true).sub(true).abs().max() / largest).item()


def errors(
    case: Case,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    gradients: bool = True,
    attention: Callable | None = None,
) -> dict[str, float]:
    """Error of the output, the lse and every gradient, by name ("out", "lse", "grad query", …).

    Both sides get the same numbers, rounded to ``dtype``. Gradients are those of a randomly
    weighted sum of the output and, with ``return_lse``, of the lse as well.
    """
    attention = attention or NA[case.rank]
    inputs = make_inputs(case, dtype, device).map(lambda t: t.detach().requires_grad_(gradients))
    true_inputs = inputs.map(lambda t: t.detach().double().requires_grad_(gradients))
    got = attention(
        **inputs.present(), **case.arguments, return_lse=case.return_lse, backend=backend
    )
    got = got if case.return_lse else (got,)
    true = brute_force(case, true_inputs)[: len(got)]
    expected = (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    assert tuple(tensor.dtype for tensor in got) == expected[: len(got)]
    result = {name: error(a, b) for name, a, b in zip(("out", "lse"), got, true, strict=False)}
    if not gradients:
        return result

    generator = torch.Generator().manual_seed(case.seed + 1)
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(device, t.dtype)
        for t in got
    ]
    got_grads = torch.autograd.grad(got, tuple(inputs.present().values()), weights)
    true_grads = torch.autograd.grad(
        true,
        tuple(true_inputs.present().values()),
        [w.double() for w in weights],
        allow_unused=True,
        materialize_grads=True,
    )
    for name, a, b in zip(inputs.present(), got_grads, true_grads, strict=True):
        assert a.dtype == dtype, name
        result[f"grad {name}"] = error(a, b)
    return result


def assert_exact(
    case: Case,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    gradients: bool = True,
) -> None:
    """Check that the backend agrees with brute force within :data:`TOLERANCE`."""
    output_tolerance, gradient_tolerance = TOLERANCE[dtype]
    for name, value in errors(case, backend, dtype, device, gradients).items():
        tolerance = gradient_tolerance if name.startswith("grad") else output_tolerance
        assert value <= tolerance, f"{name} is off by {value:.3g} > {tolerance:g} in {case}"
