"""Neighborhood attention as functions, with NATTEN's names and semantics.

https://arxiv.org/abs/2204.07143. Each backend, see :mod:`ops.backends`, is a module with two
functions, ``unavailable(inputs, params)`` and ``attend(inputs, params) -> (out, lse)``, which is
differentiable with respect to all tensors through both ``out`` and ``lse``. If
``params.return_lse`` is false, ``lse`` may be ``None``. Backends must handle fewer key and value
heads H_kv than query heads H (query head h uses key head h // (H // H_kv)), and a value dim that
differs from the query dim. Shapes:

=================  ==========================================================================
query              (B, \\*S, H, D)
key                (B, \\*S, H_kv, D)
value              (B, \\*S, H_kv, D_v)
additional_keys    (B, N, H_kv, D), attended to by all queries in the same softmax, or ``None``
additional_values  (B, N, H_kv, D_v), or ``None``
rpb                (H, 2·k₁−1, 2·k₂−1, …), added to the scaled scores of the window, or ``None``;
                   arrives in the dtype of lse
out                (B, \\*S, H, D_v), dtype of query
lse                (B, \\*S, H), natural logarithm of the softmax's denominator; float64 for
                   float64 inputs, else float32; NaN for a query with a NaN key, and infinite
                   with its scores, like ``torch.logsumexp``
=================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ops.arguments import require_tensor
from ops.autocast import autocasts, without_autocast
from ops.backends import backend_named
from ops.neighborhood import cpu, natten, reference, tiled, triton
from ops.neighborhood._checks import check_rpb, check_tensors, resolve_params
from ops.neighborhood._geometry import Inputs, NAParams

# Has `attend`.
Backend = ModuleType | SimpleNamespace
Call = tuple[NAParams, Backend]
_NAMES = Inputs._fields

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "tiled": tiled,
    "cpu": cpu,
    "triton": triton,
    "natten": natten,
}


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-D neighborhood attention: every query attends to the ``kernel_size`` keys around it.

    At the borders, windows are shifted inwards to remain full. https://arxiv.org/abs/2204.07143

    Args:
        query: (B, L, H, D).
        key: (B, L, H_kv, D); H_kv divides H, and query head h uses key head h // (H / H_kv).
        value: (B, L, H_kv, D_v).
        kernel_size: number of keys in a window; if even, kernel_size / 2 keys are to the left of
            the query and kernel_size / 2 − 1 to the right. An integer or a tuple with one per axis,
            like ``stride``, ``dilation`` and ``is_causal``.
        stride: number of adjacent queries that share the window of the middle one (the last one on
            a causal axis); stride = kernel_size gives non-overlapping windows.
        dilation: distance between the keys of a window.
        is_causal: exclude keys after the query. Windows at the start are then not full.
        scale: multiplies query · key; default: D ** -0.5.
        additional_keys: (B, N, H_kv, D), keys that all queries also attend to, in the same softmax.
        additional_values: (B, N, H_kv, D_v).
        rpb: (H, 2·kernel_size − 1), a bias added to the scaled scores of the window, indexed by
            key place − query place + kernel_size − 1, in units of the dilation.
        return_lse: also return the logarithm of the softmax's denominator.
        backend: one of :data:`BACKENDS`; default: the fastest that supports the call.

    Returns:
        out (B, L, H, D_v) in the dtype of query; with ``return_lse``, (out, lse) with lse
        (B, L, H) in float32, or in float64 for float64 inputs. Both are differentiable.

    Raises:
        ValueError: incompatible shapes, dtypes or devices, kernel_size · dilation larger than the
            map, stride larger than kernel_size, parameters that are not positive integers, or an
            unknown ``backend``.
        NotImplementedError: the given ``backend`` does not support this call; it says why.
    """
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb)
    window = (kernel_size, stride, dilation, is_causal, scale)
    return _attend(1, inputs, window, return_lse, backend)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D neighborhood attention; the window is the product of 1-D windows, see :func:`na1d`.

    query (B, H, W, heads, D), key and value likewise, rpb (heads, 2·k₁ − 1, 2·k₂ − 1), lse
    (B, H, W, heads); everything else as in :func:`na1d`.
    """
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb)
    window = (kernel_size, stride, dilation, is_causal, scale)
    return _attend(2, inputs, window, return_lse, backend)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-D neighborhood attention; the window is the product of 1-D windows, see :func:`na1d`.

    query (B, T, H, W, heads, D), key and value likewise, rpb (heads, 2·k₁ − 1, 2·k₂ − 1,
    2·k₃ − 1), lse (B, T, H, W, heads); everything else as in :func:`na1d`.
    """
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb)
    window = (kernel_size, stride, dilation, is_causal, scale)
    return _attend(3, inputs, window, return_lse, backend)


def _attend(
    rank: int, inputs: Inputs, window: tuple, return_lse: bool, backend: str | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Check the arguments, pick a backend, call it."""
    for place, tensor in enumerate(inputs):
        if place < 3 or tensor is not None:
            require_tensor(_NAMES[place], tensor)
    device = inputs.query.device
    if autocasts(device):
        # Like scaled_dot_product_attention: cast everything except float64 to autocast's dtype.
        inputs = _autocast(inputs, torch.get_autocast_dtype(device.type))
        with without_autocast(device):
            return _attend(rank, inputs, window, return_lse, backend)

    params, chosen = _resolved(rank, inputs, window, return_lse, backend)
    out, lse = chosen.attend(_tidied(inputs), params)
    return (out, lse) if return_lse else out


def _resolved(
    rank: int, inputs: Inputs, window: tuple, return_lse: bool, backend: str | None
) -> Call:
    """Resolve a call; raises ValueError for invalid arguments.

    Results are cached: models repeat their calls, and with cold caches the checks take as long as
    the attention on a small map.
    """
    if torch.compiler.is_compiling():
        return _resolve(rank, inputs, window, return_lse, backend)
    # Include types in the key, since 7 == 7.0 and 1 == True.
    window_types = [tuple(map(type, w)) if type(w) is tuple else type(w) for w in window]
    try:
        kinds = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in inputs]
        call = (rank, *kinds, window, *window_types, return_lse, backend, torch.get_num_threads())
        known = _known_calls.get(call)
    except (TypeError, RuntimeError):  # symbolic sizes, windows in lists; no strides
        return _resolve(rank, inputs, window, return_lse, backend)
    if known is None:
        known = _resolve(rank, inputs, window, return_lse, backend)
        # On a GPU, the choice depends on more, such as whether gradients are required.
        if inputs.query.device.type == "cpu" and known[1] not in (triton, natten):
            if len(_known_calls) >= _MAX_KNOWN_CALLS:
                _known_calls.clear()
            _known_calls[call] = known
    return known


_known_calls: dict[tuple, Call] = {}
_MAX_KNOWN_CALLS = 256


def _resolve(
    rank: int, inputs: Inputs, window: tuple, return_lse: bool, backend: str | None
) -> Call:
    check_tensors(rank, inputs)
    size, dim = inputs.query.shape[1:-2], inputs.query.shape[-1]
    kernel_size, stride, dilation, is_causal, scale = window
    params = resolve_params(size, dim, kernel_size, stride, dilation, is_causal, scale, return_lse)
    if inputs.rpb is not None:
        check_rpb(inputs.rpb, inputs.query, params)
    inputs = _tidied(inputs)
    chosen: Backend
    if backend is not None:
        chosen = backend_named(backend, BACKENDS, inputs, params)
    elif _is_full_attention(inputs, params):
        return params, _WHOLE_MAP
    else:
        chosen = _best_backend(inputs, params)
    is_empty = inputs.query.numel() == 0 or inputs.value.numel() == 0
    return params, reference if is_empty else chosen


def _tidied(inputs: Inputs) -> Inputs:
    """The tensors as backends expect them: rpb in the dtype of lse, no empty additional keys."""
    query, key, value, additional_keys, additional_values, rpb = inputs
    if rpb is not None:
        rpb = rpb.to(torch.promote_types(query.dtype, torch.float32))
    if additional_keys is not None and additional_keys.shape[1] == 0:
        additional_keys = additional_values = None
    return Inputs(query, key, value, additional_keys, additional_values, rpb)


def _autocast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def cast(tensor: Any) -> Any:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    query, key, value, additional_keys, additional_values = map(cast, inputs[:5])
    return Inputs(query, key, value, additional_keys, additional_values, inputs.rpb)


def _best_backend(inputs: Inputs, params: NAParams) -> ModuleType:
    """The first backend in order of preference that supports the call; ``tiled`` always does."""
    device = inputs.query.device.type
    if torch.compiler.is_exporting():
        # The only backend whose graph is the same for every size of the map.
        return reference
    if device == "cuda":
        if natten.is_fused(inputs) and natten.unavailable(inputs, params) is None:
            return natten
        if triton.unavailable(inputs, params) is None:
            return triton
    if device == "cpu" and cpu.unavailable(inputs, params) is None:
        return cpu
    return tiled


def _is_full_attention(inputs: Inputs, params: NAParams) -> bool:
    """Whether every query attends to the whole map, so that torch's own attention suffices."""
    if any(params.is_causal) or inputs.rpb is not None or params.return_lse:
        return False
    # Symbolic sizes must not be specialised.
    return all(
        statically_known_true(k == n)
        for k, n in zip(params.kernel_size, inputs.query.shape[1:-2], strict=True)
    )


def _full_attention(inputs: Inputs, params: NAParams) -> tuple[Tensor, None]:
    query, key, value, additional_keys, additional_values, _ = inputs
    size, repeats = query.shape[1:-2], query.shape[-2] // key.shape[-2]
    query, key, value = (tensor.flatten(1, -3) for tensor in (query, key, value))
    if additional_keys is not None and additional_values is not None:
        key = torch.cat([key, additional_keys], dim=1)
        value = torch.cat([value, additional_values], dim=1)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.repeat_interleave(repeats, dim=-2).transpose(1, 2),
        value.repeat_interleave(repeats, dim=-2).transpose(1, 2),
        scale=params.scale,
    )
    return out.transpose(1, 2).unflatten(1, size), None


_WHOLE_MAP = SimpleNamespace(attend=_full_attention)
