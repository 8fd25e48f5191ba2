"""Change detection for tensors whose values something else was derived from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TensorSnapshot"]


class TensorSnapshot:
    """A snapshot of tensors that detects later changes to them.

    Detects replaced tensors, replaced memory (as by ``vector_to_parameters``) and in-place changes
    that torch's version counter covers: those by operators, with or without gradient tracking. The
    counter misses writes through ``.data``, NumPy or DLPack, writes by optimizers with
    ``fused=True``, and all writes to tensors created in inference mode.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._ids = list(map(id, self._tensors))
        self._versions = list(map(_version, self._versioned))
        self._memory = list(map(_memory, self._tensors))
        self._kept = [
            t.detach() for t in self._tensors
        ]  # so that no other tensor reuses the memory

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        with torch._C.DisableTorchFunction():  # hide this from captures
            return list(map(id, tensors)) == self._ids and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the tensors are unchanged since the snapshot."""
        return (
            list(map(_version, self._versioned)) == self._versions
            and list(map(_memory, self._tensors)) == self._memory
        )


_version: Any = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
_memory = torch._C.TensorBase.data_ptr
