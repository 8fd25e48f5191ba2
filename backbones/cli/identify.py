"""Identify a published checkpoint by its tensors' names and shapes and its checksum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from backbones.cli.parity import reference, variants

Signature = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Match:
    """A file's tensors compared with those of a published model.

    Attributes:
        missing: names that only the model has.
        unexpected: names that only the file has.
        reshaped: names that both have with different shapes.
    """

    family: str
    variant: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    @property
    def differences(self) -> int:
        """The number of tensors that do not match."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def signature(tensors: Mapping[str, Tensor]) -> Signature:
    """Names and shapes of floating-point tensors (counters and index tables are derived)."""
    return {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()
    }


def closest(tensors: Mapping[str, Tensor]) -> list[Match]:
    """The published models with the fewest mismatching tensors; several if they tie.

    Args:
        tensors: a checkpoint's, with the original's names.
    """
    own = signature(tensors)
    matches = [_match(own, family, variant) for family, variant in variants()]
    least = min(match.differences for match in matches)
    return [match for match in matches if match.differences == least]


def released_file(variant_figures: Mapping[str, Any], path: Path, digest: str) -> str | None:
    """The URL of the release that ``path`` is byte for byte, if releases contain checksums.

    OpenMMLab's file names end with the first eight hex digits of the checksum.
    """
    for weights in variant_figures.get("weights") or ():
        name = re.search(r"-([0-9a-f]{8})\.pth", weights.get("url") or "")
        if name is not None and digest.startswith(name[1]):
            return str(weights["url"])
    return None


def _match(own: Signature, family: str, variant: str) -> Match:
    figures = reference(family, variant)
    derived = set(figures.get("derived", ()))
    theirs: Signature = {
        name: tuple(shape)
        for name, shape, dtype in figures["state_dict"]
        if dtype.removeprefix("torch.").startswith(("float", "bfloat")) and name not in derived
    }
    shared = own.keys() & theirs.keys()
    return Match(
        family,
        variant,
        sorted(theirs.keys() - shared),
        sorted(own.keys() - shared - derived),
        sorted(name for name in shared if own[name] != theirs[name]),
    )
