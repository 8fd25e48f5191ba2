"""The rules that select the kernel of each layer: ours, oneDNN's or torch's.

Every rule is a function of dtype, sizes and :mod:`ops.cpu.instruction_sets`. No other module checks
the hardware, so ``VISION_BACKBONES_NATIVE_ISA`` gives the decisions of a plainer CPU. Docstrings
give reasons and measurements. To measure a rule again, run the affected models with both answers,
in alternation::

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

__all__ = [
    "averages_in_linear",
    "by_tiles",
    "computed_in",
    "conv_by_kernel",
    "convolves_windows",
    "copies_windows",
    "depthwise_by_kernel",
    "depthwise_mlp_in_int8",
    "direct_by_kernel",
    "few_rows",
    "left_to_torch",
    "linear_by_kernel",
    "linear_in_int8",
    "maps_of_int8",
    "multiplies",
    "no_int8_products",
    "packs_linear",
    "pays_in_int8",
    "response_mlp_in_int8",
    "rotated_attention_by_kernel",
    "rounds_once",
    "single_head_by_kernel",
    "softmax_attention_by_kernel",
    "stem_by_kernel",
    "window_attention_by_kernel",
    "windows_pay_in_int8",
    "winograd_by_kernel",
]


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


# -- CPUs without known vector instructions -------------------------------------------------------

# Libraries of kernels that spend most of their time on matrix products.
_PRODUCTS = frozenset(
    ("gemm", "attention", "cascaded_attention", "linear_attention", "stem")
    + ("depthwise_mlp", "response_mlp", "kan", "winograd", "direct")
)


def left_to_torch(library: str, dtype: torch.dtype) -> str | None:
    """Why torch is used instead of the kernels of ``library``, or None if the kernels are used.

    Compiled for no particular instruction set, kernels that are mostly matrix products take up to
    twice as long as MKL and oneDNN, which have code for every CPU. With those libraries, fused
    SHViT-S4 and InceptionNeXt-T went from 0.6 and 0.4 to 1.1 times the speed of their plain forms.
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

    If not, oneDNN rejects bfloat16 or takes many times as long as for float32 (EfficientViT on
    AVX2: 398 ms, and 12 ms in float32). A CPU that is not x86 may support bfloat16 without any of
    our instruction sets; one emulated by selecting the plainest instruction set does not.
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


def by_tiles(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` with AMX tiles, which not all of our kernels use."""
    return dtype == torch.bfloat16 and instruction_set() == "amx"


def no_int8_products(has_instructions: bool) -> str | None:
    """Why linear layers in int8 does not pay on this CPU, or None if they do.

    At one image, SHViT-S4 and InceptionNeXt-T are 1.4 times as fast as in bfloat16 with AMX, 2.2
    and 2.5 times as fast as in float32 with AVX512-VNNI, and 2.2 and 2.7 times with AVX-VNNI. The
    older instructions of AVX2 for bytes saturate unless weights have 7 bits, and three of them do
    the products of four of float32. On ARM, where nothing was measured, SDOT multiplies four times
    as many bytes as FMLA floats.

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

    From 3136 rows, with AMX, bfloat16 takes 26 µs for 32 → 32 features, 154 for 128 → 128 and 524
    for 256 → 256; int8 81, 195 and 479. With VNNI, float32 takes 95, 800 and 3099, and int8
    135, 402 and 1524. VAN-B0 and FaViT-B0 took 1.19 and 1.15 times as long as in bfloat16 with all
    layers in int8; with these, 1.00 and 1.04 times.
    """
    limit = _FEWEST_IN_INT8_OF_TILES if by_tiles(dtype) else _FEWEST_IN_INT8
    if in_features * out_features < limit:
        return Verdict(False, "weights {in_features}·{out_features} < {limit}", limit)
    return Verdict(True, "weights {in_features}·{out_features} ≥ {limit}", limit)


@rule(yes="int8", no="floats")
def windows_pay_in_int8(in_channels: int, dtype: torch.dtype) -> Verdict:
    """Dense convolutions that ``fuse(torch.int8)`` may choose, besides :func:`pays_in_int8`.

    With AVX512-VNNI and BF16, those of ResNet-50 run at 325 to 415 GFLOP/s for one image, and in
    bfloat16 at 204 to 211; the first one, which copies windows of an image in three channels, takes
    1.22 ms, and 1.33 in bfloat16. With AMX, nothing was measured.
    """
    if by_tiles(dtype):
        return Verdict(False, "tiles of floats")
    if in_channels < _FEWEST_CHANNELS:
        return Verdict(False, "{in_channels} channels < {limit}", _FEWEST_CHANNELS)
    return Verdict(True, "{in_channels} channels ≥ {limit}", _FEWEST_CHANNELS)


# Channels from which on feed-forwards with a response norm multiply int8.
_FEWEST_OF_RESPONSE = 64


@rule(yes="int8 products", no="float products")
def response_mlp_in_int8(dim: int) -> Verdict:
    """UniRepLKNet's feed-forwards, in which rows are scaled and quantised before each layer.

    For eight images, with AMX, those of UniRepLKNet-A take 8.9 ms with 40 channels, 4.3 with 80 and
    7.2 with 160; in bfloat16 6.8, 4.5 and 10.1.
    """
    if dim < _FEWEST_OF_RESPONSE:
        return Verdict(False, "{dim} channels < {limit}", _FEWEST_OF_RESPONSE)
    return Verdict(True, "{dim} channels ≥ {limit}", _FEWEST_OF_RESPONSE)


# Channels from which on feed-forwards with a depthwise convolution multiply int8.
_FEWEST_OF_DEPTHWISE = 64
_FEWEST_OF_DEPTHWISE_IN_TILES = 192


@rule(yes="int8 products", no="float products")
def depthwise_mlp_in_int8(dim: int, dtype: torch.dtype) -> Verdict:
    """Feed-forwards with a depthwise convolution, whose kernel in floats never writes hidden rows.

    At eight images with AMX, VAN-B1 is 1.14 times as fast as in bfloat16 with this limit, 0.99 with
    128 and 0.73 without one; LITv2-S 1.17, 1.15 and 0.94; RAVLT-T 1.07, 1.10 and 1.11. With VNNI,
    VAN-B0 is 1.30 times as fast as in float32 with this limit, 1.28 with 128 and 1.10 without one.
    """
    limit = _FEWEST_OF_DEPTHWISE_IN_TILES if by_tiles(dtype) else _FEWEST_OF_DEPTHWISE
    if dim < limit:
        return Verdict(False, "{dim} channels < {limit}", limit)
    return Verdict(True, "{dim} channels ≥ {limit}", limit)


def maps_of_int8() -> torch.dtype:
    """The dtype of maps between layers in int8: bfloat16 where torch multiplies it.

    SHViT-S4 takes 6.2 ms with maps of float32 and 4.9 with bfloat16, with AMX.
    """
    return torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32


# -- linear layers -------------------------------------------------------------------------------

# oneDNN catches up on CPUs with AMX, in float32 too, and on those without the instructions that the
# kernel was written for; the same is assumed on ARM, where nothing was measured.
_FEW_ROWS = {"amx": 4096, "neonbf16": 2048, "neon": 2048, "portable": 2048}
_NARROW = 32


def few_rows() -> int:
    """The row count up to which our linear kernel, which prefetches weights, beats oneDNN's.

    There is no limit with AVX2 and AVX-512, since the kernel prefetches output cache lines: 0.99 to
    1.02 of oneDNN's time in ten models at eight images, 1.15 times as fast in MedViTV2 at
    1024×1024. With AMX, up to 4096 rather than 2048: in bfloat16 NAT, BiFormer and ViG-H are 1.06
    times as fast, and VRWKV-T at 16 images 1.19; in float32 1.02 to 1.03, and 1.10. Without a
    limit, VRWKV-T at 32 images takes 1.15 times as long in bfloat16.
    """
    return _FEW_ROWS.get(instruction_set(), sys.maxsize)


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
    most = few_rows()
    if rows <= most:
        return Verdict(True, "rows {rows} ≤ {limit}", most)
    if min(in_features, out_features) <= _NARROW:
        return Verdict(True, "features {in_features} → {out_features}, one ≤ {limit}", _NARROW)
    if activation == "gelu" and dtype == torch.bfloat16:
        return Verdict(True, "GELU in bfloat16")
    if has_factor and not by_tiles(dtype):
        return Verdict(True, "times another map")
    return Verdict(False, "rows {rows} > {limit}", most)


# Weights of a layer up to which torch's own product, which copies them in every call, is faster.
_MOST_UNPACKED = 1 << 18
# Features from which on maps are small enough for a separate pass that adds the bias.
_FEWEST_WITH_BIAS = 192


@rule(yes="packed weights", no="torch")
def packs_linear(
    in_features: int, out_features: int, has_bias: bool, activation: str, dtype: torch.dtype
) -> Verdict:
    """Whether, without a kernel of ours, oneDNN replaces torch's own layer: for large weights.

    Its calls take 20 µs, MKL's 6, and looking for changes of weights another 45 when the caches are
    full of other data. For 192 features from 196 rows, all of it is a third of the product. oneDNN
    also adds biases and applies activations in the same pass.
    """
    if activation != "none" or (has_bias and min(in_features, out_features) < _FEWEST_WITH_BIAS):
        return Verdict(True, "features {in_features} → {out_features} with a bias or an activation")
    if dtype != torch.float32 or not torch.backends.mkl.is_available():
        return Verdict(True, "MKL does not compute it")
    if in_features * out_features <= _MOST_UNPACKED:
        reason = "weights {in_features}·{out_features} ≤ {limit}"
        return Verdict(False, reason, _MOST_UNPACKED)
    return Verdict(True, "weights {in_features}·{out_features} > {limit}", _MOST_UNPACKED)


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

    With AMX, which multiplies them in tiles, so are those of an image: SHViT's first convolution
    takes 0.16 ms, and 0.58 if it is read from NCHW.
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

    On a Zen 4, one of ResNet-50 with 128 channels takes 1.2 ms, by oneDNN 2.1; with AVX2 only, 1.3
    and 2.3. In groups of 24 of 576 channels, 0.38 ms and 0.61; with AVX2 only, 0.55 and 0.53. With
    fewer channels than the limit, transforms take longer than products.

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

    On a Zen 4, one with stride 2 in groups of 24 of 576 channels takes 0.51 ms, by oneDNN 0.66; in
    bfloat16 0.25 and 0.37; with AVX2 only, 0.69 and 0.57. In groups of 8 or fewer, most of a vector
    is empty.

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

    1.3 to 2 times as fast as oneDNN's in the first layers of all families. Where windows are copied
    (:func:`copies_windows`), our convolution always is, by as much with AMX.
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

    With a limit of 524288 values rather than 131072, one image of EfficientNet-B0 takes 12.4
    instead of 13.4 ms (Zen 4), MobileNetV3-L 6.8 instead of 7.4; in bfloat16 8.6 instead of 9.7,
    and 4.4 instead of 4.8.
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
    if keys <= _MOST_KEYS_OF_TILES:
        return Verdict(True, named + " ≤ {limit}", _MOST_KEYS_OF_TILES)
    return Verdict(False, named + " > {limit}", _MOST_KEYS_OF_TILES)


@rule(yes="windows where they lie", no="copies of windows")
def window_attention_by_kernel(window_size: int, dtype: torch.dtype) -> Verdict:
    """Window attention in place in the map, up to a side of 48 keys."""
    if window_size > _LARGEST_WINDOW:
        return Verdict(False, "side {window_size} > {limit}", _LARGEST_WINDOW)
    return _softmax_attention(window_size**2, dtype, "keys {window_size}²")


@rule(yes="rotated attention in one pass", no="torch")
def rotated_attention_by_kernel(tokens: int, dtype: torch.dtype) -> Verdict:
    """RAVLT's softmax attention in one pass, except for large maps in bfloat16, left to torch.

    RAVLT-T is 1.08 times as fast at one image and at eight in float32, 1.02 and 1.06 in bfloat16.
    """
    if tokens <= _MOST_TOKENS:
        return Verdict(True, "tokens {tokens} ≤ {limit}", _MOST_TOKENS)
    if dtype != torch.bfloat16 or not multiplies(dtype):
        return Verdict(True, "tokens {tokens}, not in products of bfloat16")
    return Verdict(False, "tokens {tokens} > {limit}", _MOST_TOKENS)


@rule(yes="attention in one pass", no="torch")
def single_head_by_kernel(tokens: int) -> Verdict:
    """SHViT's attention in one pass for small maps; torch's products are faster for larger ones.

    SHViT-S4: from 17.2 to 14.9 ms at one image, from 79.1 to 76.9 at eight.
    """
    if tokens <= _MOST_TOKENS:
        return Verdict(True, "tokens {tokens} ≤ {limit}", _MOST_TOKENS)
    return Verdict(False, "tokens {tokens} > {limit}", _MOST_TOKENS)


@rule(yes="means by the linear layer", no="means, then the linear layer")
def averages_in_linear(features: int) -> Verdict:
    """FaViT's means of runs of a sequence, folded into the next linear layer up to 1024 inputs.

    FaViT-B0: from 23.1 to 21.8 ms at one image, from 113.2 to 110.9 at eight.
    """
    if features <= _LARGEST_SEQUENCE:
        return Verdict(True, "features {features} ≤ {limit}", _LARGEST_SEQUENCE)
    return Verdict(False, "features {features} > {limit}", _LARGEST_SEQUENCE)
