"""State dicts with weights in int8: models of ``fuse(torch.int8)`` in files.

A layer in int8 has its weight as int8, ``<layer>.weight_scale`` (out_features,) in float32 and,
if it was calibrated, ``<layer>.input_range`` (2,) in float32, scale and zero. ``int8_format`` is
the version of this format; files without it are of version 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backbones.common.checkpoint_files import CheckpointError
from backbones.common.checks import format_problem
from backbones.common.tables import table
from ops.cpu.gemm.int8 import LARGEST_BYTE, LEAST_STEP, quantize_weight
from ops.inference.packed_linear import Quantization, quantization_of

__all__ = ["Int8Model", "LayerPrecision", "Precision", "dequantized", "set_quantization"]

_SCALE, _RANGE = "weight_scale", "input_range"
_VERSION, _FORMAT = "int8_format", 1


class Int8Model:
    """Mixin of models that ``fuse(torch.int8)`` accepts.

    Attributes:
        precision: the layers that compute in int8, after ``fuse(torch.int8)``; else None.
    """

    precision: Precision | None = None

    def int8_state_dict(self) -> dict[str, Tensor]:
        """The state dict with int8 weights for the layers in int8, about a quarter as large.

        :func:`backbones.load_checkpoint` and ``create_model(checkpoint_path=…)`` read it: the
        model then has the same layers in int8, with the same numbers and ranges, without being
        calibrated again.

        Where the CPU does not multiply int8, there are no such layers, and all weights are floats.

        Raises:
            RuntimeError: without ``fuse(torch.int8)``.
        """
        model: Any = self
        if self.precision is None:
            raise RuntimeError(
                f"{type(self).__name__} has no layers in int8: call fuse(dtype=torch.int8) first"
            )
        state: dict[str, Tensor] = {**model.state_dict(), _VERSION: torch.tensor(_FORMAT)}
        layers = dict(model.named_modules())
        for name in self.precision.quantized:
            layer: Any = layers[name]
            weight, state[f"{name}.{_SCALE}"] = quantize_weight(layer.weight.flatten(1))
            state[f"{name}.weight"] = weight.view(layer.weight.shape)
            if layer.quantization.in_range is not None:
                state[f"{name}.{_RANGE}"] = torch.tensor(layer.quantization.in_range)
        return state


def dequantized(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, Quantization]]:
    """The weights of ``int8_state_dict()`` in float32, and how its layers in int8 compute.

    Args:
        source: where they came from, for messages.

    Raises:
        CheckpointError: another version of the format, or a scale or a range of another shape or
            dtype, or with a value that no layer can have; it names the tensor and the value.
    """
    floats = dict(tensors)
    version = floats.pop(_VERSION, None)
    if version is not None:
        number: Any = version.tolist() if _is_plain(version) else None
        if (problem := format_problem({"format": number}, _FORMAT)) is not None:
            raise CheckpointError(f"{source}: its int8 state dict {problem}")
    found: dict[str, Quantization] = {}
    for key, weight in tensors.items():
        layer, _, last = key.rpartition(".")
        if last != "weight" or f"{layer}.{_SCALE}" not in tensors or not _has_bytes(weight):
            continue
        scale, in_range = floats.pop(f"{layer}.{_SCALE}"), floats.pop(f"{layer}.{_RANGE}", None)
        name = f"{source}: {layer}"
        _require_plain(scale, weight.shape[:1], f"{name}.{_SCALE}")
        _require_scales(scale, weight.flatten(1), f"{name}.{_SCALE}")
        if in_range is not None:
            _require_plain(in_range, (2,), f"{name}.{_RANGE}")
            _require_range(in_range, f"{name}.{_RANGE}")
        floats[key] = weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))
        found[layer] = Quantization(None if in_range is None else tuple(in_range.tolist()))
    return floats, found


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _has_bytes(weight: Tensor) -> bool:
    return _is_plain(weight) and weight.dtype == torch.int8 and weight.ndim > 1


def _require_plain(numbers: Tensor, shape: tuple[int, ...], name: str) -> None:
    if numbers.shape != shape or numbers.dtype != torch.float32 or not _is_plain(numbers):
        raise CheckpointError(
            f"{name} must be {tuple(shape)} of float32, got {tuple(numbers.shape)} of "
            f"{numbers.dtype}"
        )


def _require_scales(scale: Tensor, weight: Tensor, name: str) -> None:
    """Outputs whose weights are all zero may have any small scale, others a positive one."""
    possible = scale.isfinite() & (scale >= torch.where(weight.any(1), LEAST_STEP, 0.0))
    if not possible.all():
        output = int(possible.logical_not().nonzero()[0])
        raise CheckpointError(
            f"{name} must be finite and {LEAST_STEP:.3g} or more (0 for weights of zero), but is "
            f"{scale[output].item():g} for output {output}"
        )


def _require_range(in_range: Tensor, name: str) -> None:
    scale, zero = in_range.tolist()
    if not LEAST_STEP <= scale < math.inf:
        raise CheckpointError(
            f"{name}: its scale must be finite and {LEAST_STEP:.3g} or more, got {scale:g}"
        )
    if not (0 <= zero <= LARGEST_BYTE and zero == int(zero)):
        raise CheckpointError(
            f"{name}: its zero point must be a whole number from 0 to {LARGEST_BYTE}, got {zero:g}"
        )


def set_quantization(model: nn.Module, known: Mapping[str, Quantization]) -> None:
    """Let these layers of a model compute in int8, and no others, before ``fuse(torch.int8)``."""
    if isinstance(model, Int8Model):
        model.precision = None  # of other weights
    for name, module in model.named_modules():
        if quantization_of(module) is not None:
            del module.quantization
        if name in known:
            module.quantization = known[name]


@dataclass
class LayerPrecision:
    """A linear layer or convolution of a model that was fused in int8.

    Attributes:
        layer: its name.
        in_features, out_features: its size; inputs of a convolution are those of a window.
        dtype: ``"int8"``, or the dtype of the maps.
        reason: why it is not in int8; empty if it is.
        drop: relative error of the model's output with only this layer in int8; None if it was
            not measured.
    """

    layer: str
    in_features: int
    out_features: int
    dtype: str
    reason: str = ""
    drop: float | None = None


@dataclass
class Precision:
    """What :func:`backbones.fuse` did for ``dtype=torch.int8``; ``print`` shows it as a table.

    Attributes:
        dtype: of maps and images.
        layers: the linear layers and pointwise convolutions in order; those of other packages'
            models include dense convolutions.
        calibrated: whether inputs have fixed ranges; otherwise each row of inputs has its own.
        drop: relative error of the output with all chosen layers in int8; None if it was not
            measured.
        reason: why no layer is in int8; empty if there are some.
    """

    dtype: str
    layers: list[LayerPrecision] = field(repr=False)
    calibrated: bool = False
    drop: float | None = None
    reason: str = ""

    @property
    def quantized(self) -> list[str]:
        """The names of the layers in int8."""
        return [layer.layer for layer in self.layers if layer.dtype == "int8"]

    def summary(self) -> str:
        """One line without a full stop."""
        ranges = "calibrated ranges" if self.calibrated else "a range for each row of inputs"
        parts = [
            f"{len(self.quantized)} of {len(self.layers)} layers in int8 ({ranges}), "
            f"maps in {self.dtype}"
        ]
        if self.drop is not None:
            parts.append(f"relative error of the output {self.drop:.2e}")
        if self.reason:
            parts.append(self.reason)
        return "; ".join(parts)

    def __str__(self) -> str:
        """A table with a row for each layer, most sensitive first if that was measured."""
        ranked = sorted(self.layers, key=lambda layer: -(layer.drop or 0))
        rows = [
            [
                layer.layer,
                f"{layer.in_features} → {layer.out_features}",
                layer.dtype,
                "" if layer.drop is None else f"{layer.drop:.2e}",
                layer.reason,
            ]
            for layer in ranked
        ]
        head = ("layer", "features", "dtype", "drop", "reason")
        return f"{self.summary()}\n\n{table(head, rows, left=3, last_left=True)}"
