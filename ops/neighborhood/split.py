"""Neighborhood attention as two functions with the softmax between them left to the caller.

https://arxiv.org/abs/2204.07143. The names, layouts and semantics are those of NATTEN 0.15 to 0.19
(``na2d_qk``, ``na2d_av``) and before (``natten2dqkrpb``, ``natten2dav``). All tensors are heads
first, unlike those of :func:`ops.neighborhood.na2d`:

=================  ==========================================================================
query, key         (B, H, \\*S, D)
value              (B, H, \\*S, D_v)
additional_keys    (B, H, N, D), or ``None``
additional_values  (B, H, N, D_v), or ``None``
rpb                (H, 2·k₁−1, 2·k₂−1, …), or ``None``
weights            (B, H, \\*S, K + N): the K = k₁·k₂·… keys of the query's window, the last axis
                   fastest, then the additional ones
=================  ==========================================================================

Three operators do the work, each linear in either tensor, and the gradients of each are the others:
scores (query · key), mix (Σ weight · value over a query's window), and scatter (Σ weight · query
over the queries that see a key).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_tensor
from ops.cpu.call.dispatch import kernels_apply, needs_grad
from ops.neighborhood import cpu, reference, split_tiled, triton
from ops.neighborhood._checks import check_additional, check_rpb, check_same_kind, resolve_params
from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.split_tiled import Window

__all__ = [
    "na1d_av",
    "na1d_qk",
    "na2d_av",
    "na2d_qk",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
]

_Ints = int | Sequence[int]
_Bools = bool | Sequence[bool] | None


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: _Ints,
    dilation: _Ints | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: _Bools = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Scores of 1-D neighborhood attention: query · key, not scaled, for the keys of each window.

    At the borders, windows are shifted inwards to remain full. https://arxiv.org/abs/2204.07143

    Args:
        query: (B, H, L, D).
        key: (B, H, L, D), in the dtype of query.
        kernel_size: number of keys in a window, an integer or a tuple with one per axis, like
            ``dilation`` and ``is_causal``.
        dilation: distance between the keys of a window; ``None`` means 1.
        additional_keys: (B, H, N, D), keys that all queries see.
        is_causal: exclude keys after the query; their scores are −inf. A window that is not full,
            at the start, has its keys first.
        rpb: (H, 2·kernel_size − 1), a bias added to the scores of the window, indexed by
            key place − query place + kernel_size − 1, in units of the dilation.

    Returns:
        (B, H, L, kernel_size + N) in the dtype of query: the window's keys in order, then the
        additional ones. Differentiable any number of times.

    Raises:
        ValueError: incompatible shapes, dtypes or devices, kernel_size · dilation larger than the
            map, or parameters that are not positive integers.
    """
    return _qk(1, query, key, additional_keys, rpb, (kernel_size, dilation, is_causal))


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: _Ints,
    dilation: _Ints | None = 1,
    additional_values: Tensor | None = None,
    is_causal: _Bools = False,
) -> Tensor:
    """Values of 1-D neighborhood attention: the sum over each window of weight · value.

    Args:
        attn: (B, H, L, kernel_size + N), in the order of :func:`na1d_qk`; cast to the dtype of
            ``value``. Weights of keys that a causal window lacks are ignored. Any weights will do,
            they need not come from a softmax.
        value: (B, H, L, D).
        kernel_size, dilation, is_causal: as in :func:`na1d_qk`.
        additional_values: (B, H, N, D).

    Returns:
        (B, H, L, D) in the dtype of value. Differentiable any number of times.

    Raises:
        ValueError: incompatible shapes or devices, or a bad parameter as in :func:`na1d_qk`.
    """
    return _av(1, attn, value, additional_values, (kernel_size, dilation, is_causal))


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: _Ints,
    dilation: _Ints | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: _Bools = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """See :func:`na1d_qk`: (B, H, height, width, D) twice → (B, H, height, width, K + N).

    Key (p, q) of the K = k₁·k₂ in a window is at p·k₂ + q.
    """
    return _qk(2, query, key, additional_keys, rpb, (kernel_size, dilation, is_causal))


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: _Ints,
    dilation: _Ints | None = 1,
    additional_values: Tensor | None = None,
    is_causal: _Bools = False,
) -> Tensor:
    """See :func:`na1d_av`: (B, H, height, width, K + N) and (…, D) → (B, H, height, width, D)."""
    return _av(2, attn, value, additional_values, (kernel_size, dilation, is_causal))


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: _Ints,
    dilation: _Ints | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: _Bools = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """See :func:`na1d_qk`: (B, H, depth, height, width, D) twice → (B, H, …, K + N)."""
    return _qk(3, query, key, additional_keys, rpb, (kernel_size, dilation, is_causal))


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: _Ints,
    dilation: _Ints | None = 1,
    additional_values: Tensor | None = None,
    is_causal: _Bools = False,
) -> Tensor:
    """See :func:`na1d_av`: (B, H, depth, height, width, K + N) and (…, D) → (B, H, …, D)."""
    return _av(3, attn, value, additional_values, (kernel_size, dilation, is_causal))


def natten1dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int
) -> Tensor:
    """:func:`na1d_qk` as NATTEN up to 0.14 has it."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int
) -> Tensor:
    """:func:`na2d_qk` as NATTEN up to 0.14 has it."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


natten1dqk = na1d_qk
"""NATTEN's name up to 0.14."""
natten1dav = na1d_av
"""NATTEN's name up to 0.14."""
natten2dqk = na2d_qk
"""NATTEN's name up to 0.14."""
natten2dav = na2d_av
"""NATTEN's name up to 0.14."""


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    additional_keys: Tensor | None,
    rpb: Tensor | None,
    window: tuple[Any, Any, Any],
) -> Tensor:
    if additional_keys is not None:
        require_tensor("additional_keys", additional_keys)
    _check_map(rank, "query", query)
    _check_map(rank, "key", key)
    if key.shape != query.shape:
        raise ValueError(
            f"query and key must have the same shape, got {tuple(query.shape)} and "
            f"{tuple(key.shape)}"
        )
    check_same_kind("key", key, query)
    params = _resolved(query, window)
    if rpb is not None:
        require_tensor("rpb", rpb)
        check_rpb(rpb, query.transpose(1, -2), params)
        rpb = rpb.to(torch.promote_types(query.dtype, torch.float32))
    if torch.compiler.is_exporting():
        out = reference.scores(query, key, rpb, params).to(query.dtype)
    else:
        out = _scores(query, key, rpb, -math.inf, *_of_operators(params))
    if additional_keys is None:
        return out
    check_additional("additional_keys", additional_keys, query)
    extra = query.flatten(2, -2) @ additional_keys.mT
    return torch.cat([out, extra.unflatten(2, query.shape[2:-1])], -1)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    window: tuple[Any, Any, Any],
) -> Tensor:
    if additional_values is not None:
        require_tensor("additional_values", additional_values)
    _check_map(rank, "attn", attn)
    _check_map(rank, "value", value)
    params = _resolved(value, window)
    size, keys, extra = value.shape[2:-1], math.prod(params.kernel_size), 0
    if additional_values is not None:
        check_additional("additional_values", additional_values, value)
        extra = additional_values.shape[2]
    expected = (*value.shape[:-1], keys + extra)
    if attn.shape != expected:
        raise ValueError(
            f"attn must be {tuple(expected)}, weights for the {keys} keys of a window and {extra} "
            f"additional ones, got {tuple(attn.shape)}"
        )
    if attn.device != value.device:
        raise ValueError(f"attn must be on {value.device} like value, got {attn.device}")
    attn = attn.to(value.dtype)
    of_window = attn[..., :keys]
    if torch.compiler.is_exporting():
        out = reference.mix(of_window, value, params).to(value.dtype)
    else:
        out = _mix(of_window, value, *_of_operators(params))
    if additional_values is None:
        return out
    return out + (attn[..., keys:].flatten(2, -2) @ additional_values).unflatten(2, size)


def _backward_of_scores(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key = ctx.saved_tensors
    of_query, of_key, of_rpb, *_ = ctx.needs_input_grad
    return (
        _mix(grad, key, *ctx.window) if of_query else None,
        _scatter(grad, query, *ctx.window) if of_key else None,
        _bias_gradient(grad, ctx.rpb, ctx.window) if of_rpb else None,
        *(None,) * 4,
    )


def _backward_of_mix(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, value = ctx.saved_tensors
    of_weights, of_value, *_ = ctx.needs_input_grad
    return (
        _scores(grad, value, None, 0.0, *ctx.window) if of_weights else None,
        _scatter(weights, grad, *ctx.window) if of_value else None,
        *(None,) * 3,
    )


def _backward_of_scatter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, query = ctx.saved_tensors
    of_weights, of_query, *_ = ctx.needs_input_grad
    return (
        _scores(query, grad, None, 0.0, *ctx.window) if of_weights else None,
        _mix(weights, grad, *ctx.window) if of_query else None,
        *(None,) * 3,
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.window = inputs[-3:]
    ctx.rpb = inputs[2] if isinstance(inputs[2], Tensor) else None


class _Operator:
    """A function of the backends as an operator with gradients.

    Plain calls bypass torch's dispatcher: its round trip takes longer than computing a small map.
    """

    def __init__(self, name: str, tensors: str, like: Callable, backward: Callable):
        def run(*args: Any) -> Tensor:
            *others, kernel_size, dilation, is_causal = args
            function = getattr(_backend(args[1]), name)
            out: Tensor = function(*others, (kernel_size, dilation, is_causal))
            return out

        window = "int[] kernel_size, int[] dilation, bool[] is_causal"
        self._run = run
        self._dispatched = torch.library.custom_op(
            f"vision_backbones::na_{name}",
            run,
            mutates_args=(),
            schema=f"({tensors}, {window}) -> Tensor",
        )
        self._dispatched.register_fake(like)
        self._dispatched.register_autograd(backward, setup_context=_setup_context)
        methods: dict[str, Any] = {
            "forward": staticmethod(run),
            "setup_context": staticmethod(_setup_context),
            "backward": staticmethod(backward),
        }
        self._differentiable: Any = type(name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Tensor:
        tensors = [arg for arg in args[:3] if isinstance(arg, Tensor)]
        if not kernels_apply(tensors):
            out: Tensor = self._dispatched(*args)
        elif needs_grad(tensors):
            out = self._differentiable.apply(*args)
        else:
            out = self._run(*args)
        return out


_scores = _Operator(
    "scores",
    "Tensor query, Tensor key, Tensor? rpb, float fill",
    lambda query, key, rpb, fill, *window: query.new_empty(
        (*query.shape[:-1], math.prod(window[0]))
    ),
    _backward_of_scores,
)
_mix = _Operator(
    "mix",
    "Tensor weights, Tensor value",
    lambda weights, value, *window: value.new_empty(value.shape),
    _backward_of_mix,
)
_scatter = _Operator(
    "scatter",
    "Tensor weights, Tensor query",
    lambda weights, query, *window: query.new_empty(query.shape),
    _backward_of_scatter,
)


def _bias_gradient(grad: Tensor, rpb: Tensor, window: Window) -> Tensor:
    """(B, H, *S, K) → the shape of ``rpb``: the sum over all queries."""
    kernel_size, dilation, is_causal = window
    ones = (1,) * len(kernel_size)
    params = NAParams(tuple(kernel_size), ones, tuple(dilation), tuple(is_causal), 1.0)
    _, offsets, visible = reference.windows(grad.shape[2:-1], params, grad.device)
    summed = grad.to(rpb.dtype).sum(0).flatten(1, -2).masked_fill(~visible, 0).flatten(1)
    index = offsets.flatten().expand(len(summed), -1)
    flat = torch.zeros_like(rpb).flatten(1).scatter_add(1, index, summed)
    return flat.reshape(rpb.shape)


def _backend(tensor: Tensor) -> ModuleType:
    """The module with the operators for queries or values like ``tensor``."""
    if not tensor.numel():
        return split_tiled
    if tensor.device.type == "cpu":
        like = tensor[:0].float() if tensor.dtype == torch.float16 else tensor
        return cpu if cpu.unavailable(Inputs(like, like, like)) is None else split_tiled
    heads_last = tensor.movedim(1, -2)
    if triton.unavailable(Inputs(heads_last, heads_last, heads_last)) is not None:
        return split_tiled
    from ops.neighborhood.triton import launch  # on first use, since triton is optional

    return launch


def _of_operators(params: NAParams) -> Window:
    return params.kernel_size, params.dilation, params.is_causal


def _resolved(tensor: Tensor, window: tuple[Any, Any, Any]) -> NAParams:
    kernel_size, dilation, is_causal = window
    dilation = 1 if dilation is None else dilation
    return resolve_params(
        tensor.shape[2:-1], tensor.shape[-1], kernel_size, 1, dilation, is_causal, 1.0, False
    )


def _check_map(rank: int, name: str, tensor: Tensor) -> None:
    require_tensor(name, tensor)
    if tensor.is_nested:
        raise ValueError(f"{name} must not be a nested tensor: call once for each of its tensors")
    if tensor.dim() != rank + 3 or not tensor.is_floating_point():
        axes = ("length", "height, width", "depth, height, width")[rank - 1]
        raise ValueError(
            f"{name} must be floating-point (batch, heads, {axes}, channels), got "
            f"{tuple(tensor.shape)} in {tensor.dtype}"
        )
