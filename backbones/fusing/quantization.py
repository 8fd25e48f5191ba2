"""Fusing in int8: which layers, the ranges of their inputs, and what each costs in accuracy.

Everything is measured on the folded model before its layers get their inference forms, and on other
packages' models as they are, so the result does not depend on the CPU. Calibration with clipped
ranges follows Hao Wu et al., "Integer Quantization for Deep Learning Inference",
https://arxiv.org/abs/2004.09602.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backbones.fusing.calibration import Call, readings
from backbones.fusing.int8_state import LayerPrecision, Precision
from backbones.fusing.types import tensors
from ops.cpu import policy
from ops.cpu.gemm.int8 import (
    LARGEST_BYTE,
    LARGEST_INPUT,
    LEAST_STEP,
    not_faster_in_int8,
    quantize_rows,
    quantize_weight,
)
from ops.inference.packed_linear import Quantization, quantization_of

__all__ = ["confirm", "quantize", "unquantize", "warn_if_none"]

_log = logging.getLogger(__name__)

_RANDOM_IMAGES = 2
_SHOWN = 3  # layers in a message
_MOST_CALLS = 12  # until kernels run, also of parts where the whole is not recorded
_SAMPLED = 1 << 14  # values per layer and batch that ranges are chosen for
_SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the range seen


def quantize(
    model: Any,
    calibrate: Iterable[Any] | Tensor | None,
    max_drop: float | None,
    with_windows: bool = False,
) -> tuple[Precision, list[Call] | None]:
    """Choose the layers of a model that compute in int8, before they are converted.

    With neither inputs nor a largest error, a model that is in int8 already keeps its layers, their
    ranges, and the reasons of the others.

    Args:
        model: a folded one of this library, whose layers have no inference forms yet, or any other.
        calibrate: see :mod:`backbones.fusing.calibration`; None: ranges of each row, and random
            images if errors are to be measured.
        max_drop: the largest relative error of the output; None: unlimited.
        with_windows: choose dense convolutions with windows, too.

    Returns:
        The layers, and the calls that ``calibrate`` stands for.

    Raises:
        ValueError: no batches, a batch that the model does not take or with values that are not
            finite, batches from which no layer gets a range, or no batches for a model that does
            not say which images it takes.
    """
    weight = next(model.parameters())
    layers = _layers(model, with_windows)
    classifiers = _classifiers(model, layers)
    known: dict[str, Quantization] = {}
    precision: Precision | None = getattr(model, "precision", None)  # if it was fused before
    before = {} if precision is None else {e.layer: e.reason for e in precision.layers}
    if calibrate is None and max_drop is None:
        named = ((name, quantization_of(layer)) for name, layer in layers)
        known = {name: quantization for name, quantization in named if quantization is not None}
    unquantize(model)
    reason = not_faster_in_int8(weight.device)
    if reason is not None:
        _warn_not_faster(reason)
        entries = [_entry(name, layer, False, {}) for name, layer in layers]
        for entry in entries:
            entry.dtype, entry.reason = _name(torch.float32), reason
        return Precision(_name(torch.float32), entries, reason=reason), None
    dtype = policy.maps_of_int8()
    calls: list[Call] | None = None
    ranges = {name: q.in_range for name, q in known.items() if q.in_range is not None}
    with torch.inference_mode():
        if calibrate is not None:
            ranges, calls = _calibrate(model, layers, calibrate)
        entries = [_entry(name, layer, calls is not None, ranges) for name, layer in layers]
        for entry in (entry for entry in entries if not entry.reason):
            if entry.layer in classifiers:
                entry.reason = "the classifier, whose errors no later layer evens out"
            elif known and entry.layer not in known:
                entry.reason = before.get(entry.layer) or "not quantised in the file"
        chosen = {entry.layer: entry for entry in entries if not entry.reason}
        result = Precision("", entries, bool(ranges))
        if max_drop is not None:
            probes = calls or _random_images(model)
            if not probes:
                raise ValueError(
                    f"max_drop needs calibrate=…: {type(model).__name__} does not say which images "
                    "it accepts"
                )
            _keep_within(model, dict(layers), ranges, chosen, probes, max_drop, result)
    for entry in entries:
        entry.dtype = _name(torch.int8 if entry.layer in chosen else dtype)
        if entry.layer in chosen:
            dict(layers)[entry.layer].quantization = Quantization(ranges.get(entry.layer))
    result.dtype = _name(dtype)
    return result, calls


def confirm(model: Any, precision: Precision, calls: list[Call] | None) -> None:
    """Leave out layers that no kernel of a converted model computes in int8.

    Args:
        calls: the first is made, of a batch of images with the first one; None: random images.
    """
    calls = calls or _random_images(model)
    if not calls or not precision.quantized:
        return
    args, kwargs = calls[0].to_model(model)
    if len(args) == 1 and isinstance(args[0], Tensor):
        args = (args[0][:1],)
    layers: dict[str, Any] = dict(model.named_modules())
    quantizations = [layers[name].quantization for name in precision.quantized]
    with torch.inference_mode():
        for _ in range(_MOST_CALLS):
            Call(args, kwargs).run(model)
            if model.is_replayed or all(q.is_used for q in quantizations):
                break
    for entry in precision.layers:
        layer = layers[entry.layer]
        if entry.dtype == "int8" and not layer.quantization.is_used:
            entry.dtype, entry.reason = precision.dtype, "in a block with a kernel of its own"
            del layer.quantization


def warn_if_none(model: nn.Module, precision: Precision) -> None:
    """Say why no layer is in int8, if it isn't the CPU nor ``max_drop``."""
    sensitive = any(entry.drop is not None for entry in precision.layers)
    if precision.quantized or precision.reason or sensitive:
        return
    reasons = [f"{entry.layer} ({entry.reason})" for entry in precision.layers]
    more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    told = ", ".join(reasons[:_SHOWN]) + more if reasons else "it has no linear layers, and no "
    told += "" if reasons else "convolutions that int8 is implemented for"
    precision.reason = f"no layer of {type(model).__name__} can compute in int8: {told}"
    _log.warning("%s; it computes in %s", precision.reason, precision.dtype)


@functools.cache  # once is enough
def _warn_not_faster(reason: str) -> None:
    _log.warning("fuse(torch.int8) stays in float32: %s", reason)


def unquantize(model: nn.Module) -> None:
    """Let all layers compute in the dtype of their maps again."""
    for module in model.modules():
        if quantization_of(module) is not None:
            del module.quantization


def _layers(model: nn.Module, with_windows: bool) -> list[tuple[str, Any]]:
    """Layers, also of subclasses, that could compute in int8, and have a weight of their own."""
    return [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and _is_product(m, with_windows))
        if m._parameters.get("weight") is not None
    ]


def _is_product(conv: nn.Conv2d, with_windows: bool) -> bool:
    """Whether it is a linear layer of pixels or, if so wanted, of windows."""
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if not plain or conv.groups != 1 or conv.in_channels == conv.out_channels == 1:
        return False
    return not _has_windows(conv) or (with_windows and conv.dilation == (1, 1))


def _has_windows(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d):
        return False
    return (layer.kernel_size, layer.stride, layer.padding) != ((1, 1), (1, 1), (0, 0))


def _classifiers(model: Any, layers: Sequence[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """Names of the last linear layers, which stay in floats.

    No later layer evens out their errors, and int8 saves 1 % of the time (in SHViT-S4 6 %).
    SHViT's suffers most, because a batch norm is folded into it: with it in int8, SHViT-S1
    trained on digits has a relative error of 0.051, otherwise of 0.009.
    """
    names = getattr(model, "classifier", None)  # of this library; elsewhere a layer
    if not isinstance(names, str | tuple | list):
        last = [name for name, layer in layers[-1:] if isinstance(layer, nn.Linear)]
        names = (_config(model) or {"classifier": last}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _config(model: Any) -> Mapping[str, Any] | None:
    """The description of a model of timm, or of this library, and of its images."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else None


def _entry(
    name: str, layer: Any, calibrated: bool, ranges: dict[str, tuple[float, float]]
) -> LayerPrecision:
    out_features, in_features = layer.weight.flatten(1).shape
    reason = ""
    dtype = policy.maps_of_int8()
    if in_features > LARGEST_INPUT:
        reason = f"more than {LARGEST_INPUT} inputs"
    elif not policy.pays_in_int8(in_features, out_features, dtype):
        reason = f"so small that it is faster in {_name(dtype)}"
    elif _has_windows(layer) and not policy.windows_pay_in_int8(layer.in_channels, dtype):
        reason = f"a convolution with a window, which is as fast in {_name(dtype)}"
    elif not layer.weight.isfinite().all():
        reason = "NaN or infinities in its weight"
    elif calibrated and name not in ranges:
        reason = "not called during calibration, or only with zeros or non-finite values"
    return LayerPrecision(name, in_features, out_features, "", reason)


def _random_images(model: Any) -> list[Call]:
    """A call with images of noise, (B, C, H, W), of the size that a model declares, if any."""
    config = _config(model)
    if config is None:
        return []
    channels = getattr(model, "in_chans", None)
    if not isinstance(channels, int):
        channels = config["input_size"][0]
    shape = (_RANDOM_IMAGES, channels, *config["input_size"][1:])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return [Call((images,), {}).to_model(model)]


# -- ranges --------------------------------------------------------------------------------------


def _calibrate(
    model: nn.Module, layers: Sequence[tuple[str, Any]], calibrate: Iterable[Any] | Tensor
) -> tuple[dict[str, tuple[float, float]], list[Call]]:
    """The ranges of layers, and the calls that ``calibrate`` stands for."""
    refusal: ValueError | None = None
    for calls in readings(calibrate, model):
        try:
            calls = [c.checked(model, f"calibrate: batch {n}") for n, c in enumerate(calls)]
            return _ranges(model, layers, calls), calls
        except ValueError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _ranges(
    model: nn.Module, layers: Sequence[tuple[str, Any]], calls: Iterable[Call]
) -> dict[str, tuple[float, float]]:
    """Scale and zero of each layer's inputs; without those that are never seen or of no use."""
    samples: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def observe(_: nn.Module, args: Any, kwargs: Any) -> None:
            flat = (args[0] if args else kwargs["input"]).detach().float().flatten()
            if flat.numel():
                step = max(1, flat.numel() // _SAMPLED)
                extremes = torch.stack((flat.amin(), flat.amax()))
                samples.setdefault(name, []).append(torch.cat((flat[::step], extremes)))

        return observe

    hooks = [layer.register_forward_pre_hook(watch(n), with_kwargs=True) for n, layer in layers]
    try:
        for call in calls:
            call.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    joined = {name: torch.cat(parts) for name, parts in samples.items()}
    ranges = {name: _range_of(x) for name, x in joined.items() if x.isfinite().all()}
    found = {name: (scale, zero) for name, (scale, zero) in ranges.items() if scale >= LEAST_STEP}
    if samples and not found:
        raise ValueError(
            "calibrate gives no layer inputs that are finite and not all zeros; are the images "
            "normalised, and the weights finite?"
        )
    return found


def _range_of(x: Tensor) -> tuple[float, float]:
    """The scale and zero with the smallest squared error: first the upper end, then the lower."""
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    _, high = min((_error(x, low, share * high), share * high) for share in _SHARES)
    _, low = min((_error(x, share * low, high), share * low) for share in _SHARES)
    return _scale_and_zero(low, high)


def _scale_and_zero(low: float, high: float) -> tuple[float, float]:
    scale = high / LARGEST_BYTE - low / LARGEST_BYTE
    return scale, float(round(-low / scale)) if scale else 0.0


def _error(x: Tensor, low: float, high: float) -> float:
    scale, zero = _scale_and_zero(low, high)
    if not scale:
        return x.square().mean().item()
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, int(zero), 0, LARGEST_BYTE)
    return (rounded - x).square().mean().item()


# -- errors --------------------------------------------------------------------------------------


@contextmanager
def _simulated(
    layers: dict[str, Any], ranges: dict[str, tuple[float, float]], names: Iterable[str]
) -> Iterator[None]:
    """Compute some layers as in int8, by rounding their inputs and weights."""
    kept, hooks = [], []
    try:
        for name in names:
            layer = layers[name]
            weight = layer.weight
            quantized, scale = quantize_weight(weight.flatten(1))
            kept.append((layer, weight.data))
            rounded = quantized.float() * scale[:, None]
            weight.data = rounded.view(weight.shape).to(weight.dtype)
            rounding = _rounding(layer, ranges.get(name))
            hooks.append(layer.register_forward_pre_hook(rounding, with_kwargs=True))
        yield
    finally:
        for layer, data in kept:
            layer.weight.data = data
        for hook in hooks:
            hook.remove()


def _rounding(layer: nn.Module, in_range: tuple[float, float] | None) -> Callable[..., Any]:
    channels = -3 if isinstance(layer, nn.Conv2d) else -1
    has_windows = _has_windows(layer)

    def round_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        # Windows have ranges of their own, for which those of images stand.
        rows = x.flatten(1) if has_windows else x.movedim(channels, -1)
        known = None if in_range is None else rows.new_tensor(in_range, dtype=torch.float32)
        quantized, scale, zero = quantize_rows(rows, known)
        rounded = ((quantized - zero) * scale).to(rows.dtype)
        return (rounded.view_as(x) if has_windows else rounded.movedim(-1, channels),), {}

    return round_inputs


def _keep_within(
    model: nn.Module,
    layers: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    chosen: dict[str, LayerPrecision],
    calls: Sequence[Call],
    max_drop: float,
    result: Precision,
) -> None:
    """Remove the most sensitive layers from ``chosen`` until the error is small enough."""

    def results() -> list[Tensor]:
        found = tensors([call.run(model) for call in calls])
        return [t.double() for t in found if t.is_floating_point()]

    exact = results()

    def drop_of(names: Iterable[str]) -> float:
        with _simulated(layers, ranges, names):
            outputs = results()
        if [t.shape for t in outputs] != [t.shape for t in exact]:
            return math.inf  # a detector finds other objects
        off = sum((a - b).square().sum().item() for a, b in zip(outputs, exact, strict=True))
        size = sum(b.square().sum().item() for b in exact)
        return math.sqrt(off / size) if size else math.sqrt(off)

    for name, entry in chosen.items():
        entry.drop = drop_of([name])
    ranked = sorted(chosen, key=lambda name: chosen[name].drop or 0)  # least sensitive first
    # The largest number of layers whose error is small enough, assuming that it grows with them.
    most, drop = 0, 0.0
    first, last = 1, len(ranked)
    while first <= last:
        middle = last if most == 0 and last == len(ranked) else (first + last) // 2
        error = drop_of(ranked[:middle])
        if error <= max_drop:
            most, drop, first = middle, error, middle + 1
        else:
            last = middle - 1
    for name in itertools.islice(ranked, most, None):
        chosen.pop(name).reason = f"sensitive: with it, the drop exceeds {max_drop:g}"
    result.drop = drop


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
