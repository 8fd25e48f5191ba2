"""The dtype that ``fuse(torch.int8)`` chose for each layer with a matrix product."""

from __future__ import annotations

from dataclasses import dataclass, field

from backbones.common.tables import table

__all__ = ["LayerPrecision", "Precision"]


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
