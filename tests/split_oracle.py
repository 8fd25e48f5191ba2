"""The split functions of neighborhood attention by brute force in float64, and random cases.

Nothing here uses the code under test: windows are enumerated from their definition.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from neighborhood_oracle import TOLERANCE, Case, Limits, error, random_case, window
from torch import Tensor

from ops import neighborhood

QK: dict[int, Callable] = {n: getattr(neighborhood, f"na{n}d_qk") for n in (1, 2, 3)}
AV: dict[int, Callable] = {n: getattr(neighborhood, f"na{n}d_av") for n in (1, 2, 3)}


def split_case(seed: int, limits: Limits | None = None) -> Case:
    """A random call of the split functions: no strides, equal heads."""
    case = random_case(seed, limits or Limits(grouped=False, value_dim_differs=False))
    return Case(**{**vars(case), "stride": (1,) * case.rank})


def arguments(case: Case) -> dict:
    return {name: getattr(case, name) for name in ("kernel_size", "dilation", "is_causal")}


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Query, key, value and weights, heads first; with ``packed``, in strides of wider tensors."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def mapped(channels: int) -> Tensor:
        if not case.packed:
            return normal(case.batch, case.heads, *case.size, channels)
        return normal(case.batch, *case.size, case.heads, channels + 2)[..., 1:-1].movedim(-2, 1)

    tensors = {name: mapped(case.dim) for name in ("query", "key", "value")}
    tensors["weights"] = mapped(math.prod(case.kernel_size) + case.extra)
    if case.extra:
        shape = (case.batch, case.heads, case.extra, case.dim)
        tensors |= {"additional_keys": normal(*shape), "additional_values": normal(*shape)}
    if case.has_rpb:
        tensors["rpb"] = normal(case.heads, *(2 * k - 1 for k in case.kernel_size))
    return tensors


def windows(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """For each query and place of its window: the key, the entry of the bias, whether it exists."""
    keys, entries, seen = [], [], []
    for query in itertools.product(*map(range, case.size)):
        along = []  # for each axis, (position, entry of the bias) of the keys, None for none
        for axis, i in enumerate(query):
            k, d = case.kernel_size[axis], case.dilation[axis]
            places = window(i, case.size[axis], k, 1, d, case.is_causal[axis])
            found: list = [(j, (j - i) // d + k - 1) for j in places]
            along.append(found + [None] * (k - len(found)))
        for places in itertools.product(*along):
            key = entry = 0
            for axis, place in enumerate(places):
                j, offset = place or (0, 0)
                key = key * case.size[axis] + j
                entry = entry * (2 * case.kernel_size[axis] - 1) + offset
            keys.append(key)
            entries.append(entry)
            seen.append(None not in places)
    shape = (math.prod(case.size), math.prod(case.kernel_size))
    return (
        torch.tensor(keys).reshape(shape),
        torch.tensor(entries).reshape(shape),
        torch.tensor(seen).reshape(shape),
    )


def brute_qk(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    keys, entries, seen = windows(case)
    query, key = tensors["query"].flatten(2, -2), tensors["key"].flatten(2, -2)
    out = (query[:, :, :, None] * key[:, :, keys]).sum(-1)
    if case.has_rpb:
        out = out + tensors["rpb"].flatten(1)[:, entries]
    out = out.masked_fill(~seen, -math.inf)
    if case.extra:
        out = torch.cat([out, query @ tensors["additional_keys"].mT], -1)
    return out.unflatten(2, case.size)


def brute_av(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    keys, _, seen = windows(case)
    weights = tensors["weights"].flatten(2, -2)
    of_window = weights[..., : keys.shape[1]].masked_fill(~seen, 0)
    out = (of_window[..., None] * tensors["value"].flatten(2, -2)[:, :, keys]).sum(-2)
    if case.extra:
        out = out + weights[..., keys.shape[1] :] @ tensors["additional_values"]
    return out.unflatten(2, case.size)


def our_qk(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    more = {name: tensors.get(name) for name in ("additional_keys", "rpb")}
    return QK[case.rank](tensors["query"], tensors["key"], **arguments(case), **more)


def our_av(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    more = {"additional_values": tensors.get("additional_values")}
    return AV[case.rank](tensors["weights"], tensors["value"], **arguments(case), **more)


def second_derivatives(
    case: Case, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """Of attention by both functions, with respect to all tensors."""
    made = make_inputs(case, dtype)
    tensors = {n: t.detach().to(device).requires_grad_() for n, t in made.items()}
    attn = our_qk(case, tensors).softmax(-1)
    out = our_av(case, {**tensors, "weights": attn * tensors["weights"]})
    inputs = list(tensors.values())
    grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))


FUNCTIONS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "qk": (our_qk, brute_qk, ("query", "key", "additional_keys", "rpb")),
    "av": (our_av, brute_av, ("weights", "value", "additional_values")),
}


def assert_exact(
    case: Case, which: str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> None:
    """Compare "qk" or "av" and its gradients with brute force, from the same rounded numbers."""
    ours, brute, names = FUNCTIONS[which]
    made = make_inputs(case, dtype)
    tensors = {n: t.detach().to(device).requires_grad_() for n, t in made.items()}
    true_tensors = {n: t.detach().double().requires_grad_() for n, t in made.items()}
    got, true = ours(case, tensors), brute(case, true_tensors)
    assert got.dtype == dtype
    result, got = got, got.cpu()
    assert torch.equal(got == -math.inf, true == -math.inf), "the keys that a window lacks"
    finite = true.detach().isfinite()
    tolerance, of_gradients = TOLERANCE[dtype]
    assert error(got[finite], true[finite]) <= tolerance, case
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randn(true.shape, generator=generator, dtype=torch.float64).to(dtype)
    present = [name for name in names if name in tensors]
    found = torch.autograd.grad(result, [tensors[n] for n in present], grad.to(device))
    expected = torch.autograd.grad(true, [true_tensors[n] for n in present], grad.double())
    for name, a, b in zip(present, found, expected, strict=True):
        assert a.dtype == tensors[name].dtype
        assert error(a.cpu(), b) <= of_gradients, (name, case)
