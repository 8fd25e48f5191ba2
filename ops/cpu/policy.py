"""The rules that select the kernel of each layer: ours, oneDNN's or torch's.

Every rule is a function of dtype, sizes and :mod:`ops.cpu.instruction_sets`. No other module checks
the hardware, so ``VISION_BACKBONES_NATIVE_ISA`` gives the decisions of a plainer CPU. Limits are
measured. To measure a rule again, run the affected models with both answers, in alternation::

    python tools/benchmark.py --models shvit_s4 --batches 1 8 --modes fused

:func:`observe_decisions` reports the consulted rules and their reasons; they are the last column of
``vision-backbones summary MODEL --kernels``.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec

import torch

from ops.cpu.instruction_sets import instruction_set, is_emulated

# -- decisions and their reasons -------------------------------------------------------------------


class Decision(NamedTuple):
    """A consulted rule and its answer.

    Attributes:
        arguments: its arguments by name.
        reason: the reason, with the values compared.
        outcome: what computes the layer.
        instruction_set: the instruction set that the rule was applied to.
    """

    rule: str
    arguments: Mapping[str, Any]
    answer: bool
    reason: str
    outcome: str
    instruction_set: str

    def __str__(self) -> str:
        words = [self.reason, self.instruction_set]
        dtype = self.arguments.get("dtype")
        if dtype is not None:
            words.insert(1, _format(dtype))
        return f"{self.rule}: {', '.join(words)} → {self.outcome}"


class Verdict(NamedTuple):
    """The answer of a rule, and why.

    The reason contains the rule's arguments and ``limit`` in braces. It is formatted only on
    demand, since rules are consulted in every call of a layer.
    """

    answer: bool
    reason: str
    limit: Any = None


class _Thread(threading.local):
    observer: Callable[[Decision], object] | None = None


_thread = _Thread()
P = ParamSpec("P")


@contextmanager
def observe_decisions(observer: Callable[[Decision], object]) -> Iterator[None]:
    """Context in which ``observer`` is called with each rule that this thread consults."""
    before, _thread.observer = _thread.observer, observer
    try:
        yield
    finally:
        _thread.observer = before


def rule(yes: str, no: str) -> Callable[[Callable[P, Verdict]], Callable[P, bool]]:
    """Decorator for rules: ``yes`` or ``no`` names what computes the layer."""

    def decorate(function: Callable[P, Verdict]) -> Callable[P, bool]:
        @functools.wraps(function)
        def decide(*args: P.args, **kwargs: P.kwargs) -> bool:
            verdict = function(*args, **kwargs)
            if _thread.observer is not None:
                bound = inspect.signature(function).bind(*args, **kwargs).arguments
                values = {name: _format(value) for name, value in bound.items()}
                reason = verdict.reason.format(limit=_format(verdict.limit), **values)
                _thread.observer(
                    Decision(
                        function.__name__,
                        bound,
                        verdict.answer,
                        reason,
                        yes if verdict.answer else no,
                        instruction_set(),
                    )
                )
            return verdict.answer

        return decide

    return decorate


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return "×".join(map(str, value))
    return "∞" if value == sys.maxsize else str(value).removeprefix("torch.")


def _from(shown: str, value: int, limit: int) -> Verdict:
    """Whether a value, ``shown`` as in a reason, reaches the limit."""
    reaches = value >= limit
    return Verdict(reaches, f"{shown} {'≥' if reaches else '<'} {{limit}}", limit)


def _up_to(shown: str, value: int, limit: int) -> Verdict:
    """Whether a value, ``shown`` as in a reason, does not exceed the limit."""
    exceeds = value > limit
    return Verdict(not exceeds, f"{shown} {'>' if exceeds else '≤'} {{limit}}", limit)


# -- CPUs without known vector instructions -------------------------------------------------------

# Libraries of kernels that spend most of their time on matrix products.
_PRODUCTS = frozenset(
    ("gemm", "attention", "cascaded_attention", "linear_attention", "stem")
    + ("depthwise_mlp", "response_mlp", "kan", "winograd", "direct")
)


def left_to_torch(library: str, dtype: torch.dtype) -> str | None:
    """Why torch is used instead of the kernels of ``library``, or None if the kernels are used.

    Compiled for no particular instruction set, kernels that are mostly matrix products take up to
    twice as long as MKL and oneDNN, which have code for every CPU.
    """
    if (
        library in _PRODUCTS
        and instruction_set() == "portable"
        and multiplies(dtype)
        and torch.backends.mkldnn.is_available()
    ):
        return "without known vector instructions torch is faster"
    return None


def rounds_once() -> bool:
    """Whether kernels round a product and a sum once, as torch does on every CPU with an FMA."""
    return instruction_set() != "portable"


# -- dtypes of matrix products -------------------------------------------------------------------


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast matrix products of ``dtype``, float32 or bfloat16, on this CPU.

    If not, oneDNN rejects bfloat16 or takes many times as long as for float32. A CPU that is not
    x86 may support bfloat16 without any of our instruction sets; one emulated by selecting the
    plainest instruction set does not.
    """
    if dtype != torch.bfloat16:
        return True
    isa = instruction_set()
    return (
        isa not in ("avx512", "avx2", "neon")
        and not (isa == "portable" and is_emulated())
        and _has_bfloat16()
    )


@functools.cache
def _has_bfloat16() -> bool:
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that oneDNN computes in: float32 if the CPU doesn't support ``dtype``."""
    return dtype if multiplies(dtype) else torch.float32


def bfloat16_pays(is_amd: bool) -> bool | None:
    """Whether fused models are faster in bfloat16 than in float32; None if it must be timed.

    With AVX512-BF16 and without AMX, Intel's CPUs were seen to run networks in bfloat16 at 0.6 to
    0.9 of the speed of plain float32.
    """
    if not multiplies(torch.bfloat16):
        return False
    isa = instruction_set()
    return True if isa in ("amx", "neonbf16") or (isa == "avx512bf16" and is_amd) else None


def by_tiles(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` with AMX tiles, which not all of our kernels use."""
    return dtype == torch.bfloat16 and instruction_set() == "amx"


def no_int8_products(has_instructions: bool) -> str | None:
    """Why linear layers in int8 do not pay on this CPU, or None if they do.

    The older instructions of AVX2 for int8 saturate unless weights have 7 bits, and three of them
    do the products of four of float32. On ARM, nothing was measured.

    Args:
        has_instructions: whether the CPU has AVX512-VNNI, with AVX2 AVX-VNNI, or FEAT_DotProd.
    """
    if has_instructions:
        return None
    isa = instruction_set()
    return f"{isa} without int8 dot products (VNNI, SDOT), so int8 is not faster here"


@rule(yes="int8 products", no="float products")
def linear_in_int8(has_products: bool, dtype: torch.dtype) -> Verdict:
    """Layers that ``fuse(torch.int8)`` chose, unless they are on another CPU now."""
    if has_products:
        return Verdict(True, "chosen by fuse(int8)")
    return Verdict(False, "this CPU has no int8 instructions")


# Weights from which on a layer is faster in int8 than in the dtype of its maps.
_FEWEST_IN_INT8 = 1 << 11
_FEWEST_IN_INT8_OF_TILES = 1 << 15


@rule(yes="int8", no="floats")
def pays_in_int8(in_features: int, out_features: int, dtype: torch.dtype) -> Verdict:
    """Layers that ``fuse(torch.int8)`` may choose: weights large enough to offset quantising rows.

    With AMX, int8 overtakes bfloat16 between 128 → 128 and 256 → 256 features, and with VNNI
    float32 between 32 → 32 and 128 → 128.
    """
    limit = _FEWEST_IN_INT8_OF_TILES if by_tiles(dtype) else _FEWEST_IN_INT8
    return _from("weights {in_features}·{out_features}", in_features * out_features, limit)


@rule(yes="int8", no="floats")
def windows_pay_in_int8(in_channels: int, dtype: torch.dtype) -> Verdict:
    """Dense convolutions that ``fuse(torch.int8)`` may choose, besides :func:`pays_in_int8`.

    Those of an image in three channels gain little. With AMX, nothing was measured.
    """
    if by_tiles(dtype):
        return Verdict(False, "tiles of floats")
    return _from("{in_channels} channels", in_channels, _FEWEST_CHANNELS)


# Channels from which on feed-forwards with a response norm multiply int8.
_FEWEST_OF_RESPONSE = 64


@rule(yes="int8 products", no="float products")
def response_mlp_in_int8(dim: int) -> Verdict:
    """UniRepLKNet's feed-forwards, in which rows are scaled and quantised before each layer.

    With AMX, int8 overtakes bfloat16 between 40 and 80 channels.
    """
    return _from("{dim} channels", dim, _FEWEST_OF_RESPONSE)


# Channels from which on feed-forwards with a depthwise convolution multiply int8.
_FEWEST_OF_DEPTHWISE = 64
_FEWEST_OF_DEPTHWISE_IN_TILES = 192


@rule(yes="int8 products", no="float products")
def depthwise_mlp_in_int8(dim: int, dtype: torch.dtype) -> Verdict:
    """Feed-forwards with a depthwise convolution, whose kernel in floats never writes hidden rows.

    Without a limit, VAN and LITv2 are slower than in bfloat16 with AMX.
    """
    limit = _FEWEST_OF_DEPTHWISE_IN_TILES if by_tiles(dtype) else _FEWEST_OF_DEPTHWISE
    return _from("{dim} channels", dim, limit)


def maps_of_int8() -> torch.dtype:
    """The dtype of maps between layers in int8: bfloat16 where torch multiplies it."""
    return torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32


# -- linear layers -------------------------------------------------------------------------------

# The rows up to which our linear kernel, which prefetches weights, beats oneDNN's. With AVX2 and
# AVX-512 there is no limit, since it prefetches output cache lines. oneDNN catches up on CPUs with
# AMX, in float32 too (half the limit slows down NAT, BiFormer, ViG and VRWKV, and none VRWKV at 32
# images), and on those without the instructions that the kernel was written for; the same is
# assumed on ARM, where nothing was measured.
_FEW_ROWS = {"amx": 4096, "neonbf16": 2048, "neon": 2048, "portable": 2048}
_NARROW = 32


@rule(yes="packed GEMM", no="oneDNN")
def linear_by_kernel(
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    activation: str,
    has_factor: bool = False,
) -> Verdict:
    """Our linear kernel: for few rows, few features, or a GELU that oneDNN computes in bfloat16.

    Also if torch has no fast products of ``dtype``, and for outputs times another map, which take a
    pass of their own after oneDNN's.
    """
    if not multiplies(dtype):
        return Verdict(True, "torch has no products of it")
    most = _FEW_ROWS.get(instruction_set(), sys.maxsize)
    if rows <= most:
        return Verdict(True, "rows {rows} ≤ {limit}", most)
    if min(in_features, out_features) <= _NARROW:
        return Verdict(True, "features {in_features} → {out_features}, one ≤ {limit}", _NARROW)
    if activation == "gelu" and dtype == torch.bfloat16:
        return Verdict(True, "GELU in bfloat16")
    if has_factor and not by_tiles(dtype):
        return Verdict(True, "times another map")
    return Verdict(False, "rows {rows} > {limit}", most)


# -- convolutions --------------------------------------------------------------------------------

# With fewer channels, copying windows is slow. Maps with so few are images in NCHW.
_FEWEST_CHANNELS = 16
# Windows further apart are read once or twice, so that copying them is cheap.
_MOST_OVERLAPPING = 4
# From this many taps on, and for oblong or dilated windows, our kernel is faster.
_LARGE_WINDOW = 49
# Also for maps of up to this many values: within a network, a call of oneDNN takes 0.1 to 0.3 ms
# more than when repeated by itself.
_SMALL_MAP = 1 << 19
_VECTOR = 16  # floats, at most
_FEWEST_TRANSFORMED = 32
_FEWEST_OF_GROUP = 24
# Where convolutions in groups and dense ones in bfloat16 were measured to be faster than oneDNN's.
_CONVOLVES = ("avx512", "avx512bf16")


def copies_windows(in_channels: int, stride: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether windows are copied and multiplied, rather than read from an image in NCHW.

    With AMX, which multiplies them in tiles, so are those of an image.
    """
    if in_channels >= _FEWEST_CHANNELS or by_tiles(dtype):
        return True
    return min(stride) > _MOST_OVERLAPPING and instruction_set() != "portable"


@rule(yes="our convolution", no="oneDNN")
def convolves_windows(
    stride: tuple[int, ...], dilation: tuple[int, ...], groups: int, dtype: torch.dtype
) -> Verdict:
    """Dense convolutions for which one of our kernels can be faster.

    These are strided, where oneDNN stalls on loads of weights and maps; :func:`conv_by_kernel`
    decides case by case.
    """
    if groups != 1:
        return Verdict(False, "{groups} groups")
    if tuple(dilation) != (1, 1):
        return Verdict(False, "dilation {dilation}")
    if tuple(stride) == (1, 1):
        return Verdict(False, "stride {stride}")
    if not multiplies(dtype):
        return Verdict(False, "bfloat16 would be computed in float32")
    return Verdict(True, "stride {stride}")


@rule(yes="Winograd's convolution", no="direct convolution")
def winograd_by_kernel(
    in_channels: int, out_channels: int, groups: int, dtype: torch.dtype
) -> Verdict:
    """3×3 convolutions without stride, whose windows are transformed for fewer products.

    With fewer channels than the limit, transforms take longer than products.

    Args:
        in_channels, out_channels: of a group.
    """
    if dtype != torch.float32:
        return Verdict(False, "too inexact in bfloat16")
    if groups > 1 and instruction_set() not in _CONVOLVES:
        return Verdict(False, "{groups} groups on a CPU where oneDNN may be faster")
    limit = _FEWEST_TRANSFORMED if groups == 1 else _FEWEST_OF_GROUP
    if min(in_channels, out_channels) < limit:
        return Verdict(False, "{in_channels} → {out_channels} channels, one < {limit}", limit)
    return Verdict(True, "{in_channels} → {out_channels} channels ≥ {limit}", limit)


@rule(yes="our convolution", no="another")
def direct_by_kernel(
    in_channels: int, out_channels: int, groups: int, dtype: torch.dtype
) -> Verdict:
    """Convolutions in groups, and dense ones in bfloat16, with AVX-512 but without AMX.

    In groups of 8 or fewer, most of a vector is empty.

    Args:
        in_channels, out_channels: of a group.
    """
    if instruction_set() not in _CONVOLVES:
        return Verdict(False, "a CPU where oneDNN may be faster")
    if not multiplies(dtype):
        return Verdict(False, "bfloat16 would be computed in float32")
    if groups == 1 and dtype == torch.float32:
        return Verdict(False, "one group")
    if min(in_channels, out_channels) < _FEWEST_OF_GROUP:
        reason = "{in_channels} → {out_channels} channels, one < {limit}"
        return Verdict(False, reason, _FEWEST_OF_GROUP)
    reason = "{in_channels} → {out_channels} channels ≥ {limit}"
    return Verdict(True, reason, _FEWEST_OF_GROUP)


@rule(yes="our convolution", no="oneDNN")
def conv_by_kernel(in_channels: int, is_nchw: bool, dtype: torch.dtype) -> Verdict:
    """Our strided convolution of few channels: unless an image in NHWC had to be copied to NCHW.

    Where windows are copied (:func:`copies_windows`), our convolution is always faster.
    """
    reason = "{in_channels} channels in NCHW" if is_nchw else "{in_channels} channels in NHWC"
    return Verdict(is_nchw, reason)


@rule(yes="the first layers in one pass", no="layer by layer")
def stem_by_kernel(has_odd_channels: bool, dtype: torch.dtype) -> Verdict:
    """A chain of 3×3 convolutions in one pass, except with AMX; bfloat16 needs even channels."""
    if by_tiles(dtype):
        return Verdict(False, "in tiles")
    if has_odd_channels and dtype == torch.bfloat16:
        return Verdict(False, "odd channels")
    return Verdict(True, "not in tiles")


@rule(yes="direct depthwise", no="oneDNN")
def depthwise_by_kernel(
    values: int,
    channels: int,
    kernel_size: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    is_nhwc: bool,
    dtype: torch.dtype,
) -> Verdict:
    """Our depthwise convolution: for large, oblong or dilated windows, 3×3, and small maps.

    oneDNN would copy a slice of the channels, which our kernel reads in place; in bfloat16, oneDNN
    handles whole vectors only. Without known vector instructions, our 3×3 takes three times as long
    as oneDNN's.
    """
    rows, columns = kernel_size
    if values <= _SMALL_MAP:
        return Verdict(True, "values {values} ≤ {limit}", _SMALL_MAP)
    if not multiplies(dtype):
        return Verdict(True, "torch has no products of it")
    if not is_nhwc:
        return Verdict(True, "only some of the channels")
    if tuple(dilation) != (1, 1):
        return Verdict(True, "dilation {dilation}")
    if rows != columns or rows * columns >= _LARGE_WINDOW:
        return Verdict(True, "window {kernel_size}, oblong or of ≥ {limit} taps", _LARGE_WINDOW)
    # A specialized code path of our kernel, but slow for partial vectors of bfloat16.
    own = (rows, columns) == (3, 3) and tuple(padding) == (1, 1)
    own &= instruction_set() != "portable"
    if own and (dtype == torch.float32 or channels % _VECTOR == 0):
        return Verdict(True, "window {kernel_size}, padding {padding}")
    return Verdict(False, "window {kernel_size}, values {values} > {limit}", _SMALL_MAP)


# -- attention -----------------------------------------------------------------------------------

_MOST_KEYS_OF_TILES = 256
_MOST_TOKENS = 256
# Keys along a side. For larger windows, finding identical lines of terms takes too long.
_LARGEST_WINDOW = 48
# Input features of a linear layer that averages runs of a sequence on the way.
_LARGEST_SEQUENCE = 1024


@rule(yes="softmax attention in one pass", no="torch")
def softmax_attention_by_kernel(keys: int, dtype: torch.dtype) -> Verdict:
    """Our softmax attention, except for many keys in bfloat16 with AMX, where torch is used."""
    return _softmax_attention(keys, dtype, "keys {keys}")


def _softmax_attention(keys: int, dtype: torch.dtype, named: str) -> Verdict:
    if not by_tiles(dtype):
        return Verdict(True, named + ", not in tiles")
    return _up_to(named, keys, _MOST_KEYS_OF_TILES)


@rule(yes="windows where they lie", no="copies of windows")
def window_attention_by_kernel(window_size: int, dtype: torch.dtype) -> Verdict:
    """Window attention in place in the map, up to a side of 48 keys."""
    if window_size > _LARGEST_WINDOW:
        return Verdict(False, "side {window_size} > {limit}", _LARGEST_WINDOW)
    return _softmax_attention(window_size**2, dtype, "keys {window_size}²")


@rule(yes="rotated attention in one pass", no="torch")
def rotated_attention_by_kernel(tokens: int, dtype: torch.dtype) -> Verdict:
    """RAVLT's softmax attention in one pass, except for large maps in bfloat16, left to torch."""
    if tokens > _MOST_TOKENS and (dtype != torch.bfloat16 or not multiplies(dtype)):
        return Verdict(True, "tokens {tokens}, not in products of bfloat16")
    return _up_to("tokens {tokens}", tokens, _MOST_TOKENS)


@rule(yes="attention in one pass", no="torch")
def single_head_by_kernel(tokens: int) -> Verdict:
    """SHViT's attention in one pass for small maps; torch's products are faster for larger ones."""
    return _up_to("tokens {tokens}", tokens, _MOST_TOKENS)


@rule(yes="means by the linear layer", no="means, then the linear layer")
def averages_in_linear(features: int) -> Verdict:
    """FaViT's means of runs of a sequence, folded into the next linear layer up to 1024 inputs."""
    return _up_to("features {features}", features, _LARGEST_SEQUENCE)
