"""Whether tensors are still what they were, for things that were made of what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Seen"]


class Seen:
    """Tensors as they are now.

    Noticed later on are other tensors, other memory (which ``vector_to_parameters`` gives them) and
    changes in place that torch counts. It counts those of operators, whether gradients are tracked
    or not, but neither writes through ``.data``, NumPy or DLPack nor those of optimizers with
    ``fused=True``, nor any of a tensor that was made in inference mode.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._ids = list(map(id, self._tensors))
        self._versions = list(map(_version, self._versioned))
        self._memory = list(map(_memory, self._tensors))
        self._kept = [t.detach() for t in self._tensors]  # lest something else comes to lie there

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        with torch._C.DisableTorchFunction():  # a recorder is not to see it
            return list(map(id, tensors)) == self._ids and self.unchanged()

    def unchanged(self) -> bool:
        """Whether they are as they were."""
        return (
            list(map(_version, self._versioned)) == self._versions
            and list(map(_memory, self._tensors)) == self._memory
        )


_version: Any = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
_memory = torch._C.TensorBase.data_ptr
