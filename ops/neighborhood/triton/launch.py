"""Launching the Triton kernels of neighborhood attention: tiles, autotuning and buffers.

Neighborhood attention: https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.split_tiled import Window
from ops.neighborhood.triton.backward import (
    delta_kernel,
    grad_bias_kernel,
    grad_extra_kernel,
    grad_key_value_kernel,
)
from ops.neighborhood.triton.queries import queries_kernel
from ops.neighborhood.triton.split import scores_kernel, sums_kernel
from ops.neighborhood.triton.tiles import (
    configs,
    fitting,
    may_fill_keys,
    may_fill_queries,
    padded,
)
from ops.triton_devices import LAUNCH_OPTIONS

# Number of programs that fill a large GPU. Sums with few results are split into about as many.
_PROGRAMS = 1024


def _fixed(arguments: dict[str, Any]) -> triton.Config | None:
    """The tiles to use without measuring, or None to autotune."""
    if triton.knobs.runtime.interpret:
        return configs(arguments["RANK"])[-1]
    if torch.are_deterministic_algorithms_enabled():
        return fitting(arguments["RANK"], arguments)[0]
    return None


_queries = triton.heuristics({"MAY_FILL": may_fill_queries})(queries_kernel)
_grad_key_value = triton.heuristics({"MAY_FILL": may_fill_keys})(grad_key_value_kernel)


@functools.cache
def _tuned(kernel: Any, rank: int, dtype: torch.dtype) -> Any:
    """With a tuning result for each ``dtype``, which the key of Triton's cache lacks."""

    def prune(
        candidates: list[triton.Config], named: dict[str, Any], **keywords: Any
    ) -> list[triton.Config]:
        return fitting(rank, keywords)

    return triton.autotune(
        configs=configs(rank),
        key=[
            "work", "heads_per_kv", "KERNEL", "STRIDE", "DILATION", "CAUSAL",
            "PADDED_DIM", "PADDED_VALUE_DIM", "HAS_BIAS", "PRECISION", "GRADIENT", "OF_KEYS",
        ],
        prune_configs_by={"early_config_prune": prune},
    )(kernel)  # fmt: skip


def run(kernel: Any, grid: Any, arguments: dict[str, Any], config: triton.Config | None) -> None:
    """Launch a kernel with those arguments that it has; without ``config``, autotune its tiles."""
    own = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    if config is None:
        tuned = _tuned(kernel, arguments["RANK"], arguments["q_ref"][0].dtype)
        tuned[grid](**own, **LAUNCH_OPTIONS)
    else:
        kernel[grid](**own, **config.all_kwargs(), **LAUNCH_OPTIONS)


def _run_tiles(kernel: Any, batch_heads: int, arguments: dict[str, Any]) -> None:
    """Launch a kernel with a program for each tile of each dilation group and head."""
    size, dilation = arguments["size"], arguments["DILATION"]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        programs = batch_heads
        for n, d, tile in zip(size, dilation, meta["TILE"], strict=True):
            programs *= triton.cdiv(triton.cdiv(n, d), tile) * d
        return (programs,)

    # Shapes with a similar amount of work share a tuning result.
    work = (batch_heads * math.prod(size)).bit_length()
    run(kernel, grid, {**arguments, "work": work}, _fixed(arguments))


def _triple(values: Sequence[Any], fill: Any) -> tuple[Any, Any, Any]:
    first, second, third = (fill,) * (3 - len(values)) + tuple(values)
    return first, second, third


def _ref(tensor: Tensor | None, rank: int) -> tuple[Any, ...] | None:
    """A tensor of `rank` axes between batch and heads: its pointer, strides of [B, Z, Y, X, H, …].

    None for an absent one.
    """
    if tensor is None:
        return None
    strides = tensor.stride()
    return (tensor, strides[0], *_triple(strides[1 : 1 + rank], 0), *strides[1 + rank :])


def _precision() -> str:
    # torch before 2.9 has only allow_tf32; reading it may raise an error in newer versions.
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    # Three TF32 products are as accurate as float32 and much faster than scalar arithmetic.
    return "tf32" if allowed == "tf32" else "tf32x3"


def _arguments(inputs: Inputs, params: NAParams) -> dict[str, Any]:
    """The arguments of kernels that follow from the inputs."""
    query, key, value, additional_keys, additional_values, rpb = inputs
    rank = params.rank
    return {
        "q_ref": _ref(query, rank),
        "k_ref": _ref(key, rank),
        "v_ref": _ref(value, rank),
        "extra_k_ref": _ref(additional_keys, 1),
        "extra_v_ref": _ref(additional_values, 1),
        "bias_ptr": rpb,
        "size": _triple(query.shape[1 : 1 + rank], 1),
        "batches": query.shape[0],
        "heads": query.shape[-2],
        "kv_heads": key.shape[-2],
        "heads_per_kv": query.shape[-2] // key.shape[-2],
        "num_extra": 0 if additional_keys is None else additional_keys.shape[1],
        "scale": params.scale,
        "RANK": rank,
        "KERNEL": _triple(params.kernel_size, 1),
        "STRIDE": _triple(params.stride, 1),
        "DILATION": _triple(params.dilation, 1),
        "CAUSAL": _triple(params.is_causal, False),
        "DIM": query.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "PADDED_DIM": padded(query.shape[-1]),
        "PADDED_VALUE_DIM": padded(value.shape[-1]),
        "HAS_EXTRA": additional_keys is not None,
        "HAS_BIAS": rpb is not None,
        "PRECISION": _precision(),
    }


def forward(inputs: Inputs, params: NAParams) -> tuple[Tensor, Tensor]:
    """Output [B, *S, H, D_v] and natural log-sum-exp [B, *S, H], both contiguous."""
    query = inputs.query
    out = query.new_empty(*query.shape[:-1], inputs.value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    arguments = {
        **_arguments(inputs, params),
        **{"out_ref": _ref(out, params.rank), "lse_ref": _ref(lse, params.rank)},
        **{"grad_out_ref": None, "delta_ptr": None, "GRADIENT": False},
    }
    with torch.cuda.device_of(query):
        _run_tiles(_queries, query.shape[0] * query.shape[-2], arguments)
    return out, lse


def _delta(out: Tensor, grad_lse: Tensor, rank: int, arguments: dict[str, Any]) -> Tensor:
    delta = out.new_empty(out.shape[:-1], dtype=torch.float32)
    rows = max(1, 4096 // padded(out.shape[-1]))
    arguments = {
        **arguments,
        "out_ptr": out,
        "grad_lse_ref": _ref(grad_lse, rank),
        "delta_ptr": delta,
        "rows": delta.numel(),
    }
    grid = (triton.cdiv(delta.numel(), rows),)
    run(delta_kernel, grid, arguments, triton.Config({"ROWS": rows}))
    return delta


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    params: NAParams,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, additional keys, additional values and rpb.

    ``out`` and ``lse`` are the results of :func:`forward`. Gradients that are not ``needed`` are
    None, unless another one takes the same pass.
    """
    query, key, value, additional_keys, additional_values, rpb = inputs
    rank = params.rank
    batches, heads, kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
    out, lse = out.contiguous(), lse.contiguous()
    grad_query = grad_key = grad_value = grad_extra_keys = grad_extra_values = grad_rpb = None
    with torch.cuda.device_of(query):
        common = _arguments(inputs, params)
        common |= {"grad_out_ref": _ref(grad_out, rank), "lse_ref": _ref(lse, rank)}
        common["delta_ptr"] = _delta(out, grad_lse, rank, common)
        if needed[0]:
            grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
            of_query = {"out_ref": _ref(grad_query, rank), "GRADIENT": True}
            _run_tiles(_queries, batches * heads, {**common, **of_query})
        if needed[1] or needed[2]:
            grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
            grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
            of_keys = {"grad_k_ref": _ref(grad_key, rank), "grad_v_ref": _ref(grad_value, rank)}
            _run_tiles(_grad_key_value, batches * kv_heads, {**common, **of_keys})
        if additional_keys is not None and additional_values is not None and any(needed[3:5]):
            grad_extra_keys, grad_extra_values = _grad_extra(
                additional_keys, additional_values, common
            )
        if needed[5] and rpb is not None:
            grad_rpb = _grad_rpb(rpb, batches, common)
    return grad_query, grad_key, grad_value, grad_extra_keys, grad_extra_values, grad_rpb


def _grad_extra(
    additional_keys: Tensor, additional_values: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    batches, num_extra, kv_heads, _ = additional_keys.shape
    tokens = math.prod(arguments["size"])
    dims = arguments["PADDED_DIM"] + arguments["PADDED_VALUE_DIM"]
    row_bytes = dims * additional_keys.element_size()
    rows = columns = 32 if row_bytes <= 512 else 16
    programs = triton.cdiv(num_extra, rows) * batches * kv_heads
    # Give each program a few blocks. Independent of the GPU, so that the sums are, too.
    splits = max(1, min(triton.cdiv(_PROGRAMS, programs), tokens // (4 * columns)))
    lse = arguments["lse_ref"][0]
    partial_keys = lse.new_empty(splits, *additional_keys.shape)
    partial_values = lse.new_empty(splits, *additional_values.shape)
    arguments = {
        **arguments,
        "partial_k_ptr": partial_keys,
        "partial_v_ptr": partial_values,
        "splits": splits,
    }
    config = triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=4, num_stages=1)
    run(grad_extra_kernel, (programs * splits,), arguments, config)
    return (
        partial_keys.sum(0).to(additional_keys.dtype),
        partial_values.sum(0).to(additional_values.dtype),
    )


def _bias_span(size: int, row_bytes: int) -> int:
    """Queries and keys along the last axis per step of a program of the bias gradient."""
    span = min(64, padded(size))
    # Longer spans do not fit in registers.
    while span > 16 and span * row_bytes > 8 * 1024:
        span //= 2
    return span


def _grad_rpb(rpb: Tensor, batches: int, arguments: dict[str, Any]) -> Tensor:
    heads = rpb.shape[0]
    size, dilation = arguments["size"], arguments["DILATION"]
    wide = _triple(rpb.shape[1:], 1)
    dims = arguments["PADDED_DIM"] + arguments["PADDED_VALUE_DIM"]
    per_group = triton.cdiv(size[2], dilation[2])
    span = _bias_span(per_group, dims * arguments["q_ref"][0].element_size())
    spans = triton.cdiv(wide[2] - 1 + span, span)
    programs = heads * wide[0] * wide[1] * spans
    lines = batches * size[0] * size[1] * dilation[2] * triton.cdiv(per_group, span)
    splits = max(1, min(triton.cdiv(_PROGRAMS, programs), lines))
    partial = arguments["lse_ref"][0].new_empty(splits, heads, wide[0] * wide[1], spans, 2, span)
    arguments = {
        **arguments,
        "partial_ptr": partial,
        "splits": splits,
    }
    config = triton.Config({"SPAN": span}, num_warps=4, num_stages=1)
    run(grad_bias_kernel, (programs * splits,), arguments, config)
    # The upper half of a span's sums and the lower half of the next one's belong to the same
    # entries.
    sums = partial.sum(0)
    table = F.pad(sums[..., 0, :], (0, 0, 0, 1)) + F.pad(sums[..., 1, :], (0, 0, 1, 0))
    table = table.flatten(-2)[..., span : span + wide[2]]
    return torch.empty_like(rpb).copy_(table.reshape(rpb.shape))


# ---- scores and sums alone, of tensors that are heads first --------------------------------------
def scores(query: Tensor, key: Tensor, rpb: Tensor | None, fill: float, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scores`."""
    shape = (*query.shape[:-1], math.prod(window[0]))
    # Windows without causal axes are full.
    out = query.new_full(shape, fill) if any(window[2]) else query.new_empty(shape)
    _run_split(scores_kernel, query, key, out, window, None if rpb is None else rpb.contiguous())
    return out


def mix(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.mix`."""
    out = value.new_empty(value.shape)
    _run_split(sums_kernel, out, value, weights, window, OF_KEYS=True)
    return out


def scatter(weights: Tensor, query: Tensor, window: Window) -> Tensor:
    """See :func:`ops.neighborhood.split_tiled.scatter`."""
    out = query.new_empty(query.shape)
    _run_split(sums_kernel, query, out, weights, window, OF_KEYS=False)
    return out


def _run_split(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    window: Window,
    rpb: Tensor | None = None,
    **options: bool,
) -> None:
    kernel_size, dilation, is_causal = window
    strides = (1,) * len(kernel_size)
    params = NAParams(tuple(kernel_size), strides, tuple(dilation), tuple(is_causal), 1.0)
    heads_last, key, weights = (t.movedim(1, -2) for t in (query, key, weights))
    arguments = _arguments(Inputs(heads_last, key, key, rpb=rpb), params)
    del arguments["PADDED_VALUE_DIM"]  # a tile holds one row for each position
    arguments |= {"w_ref": _ref(weights, params.rank), **options}
    with torch.cuda.device_of(query):
        _run_tiles(kernel, query.shape[0] * query.shape[1], arguments)
