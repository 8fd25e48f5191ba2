"""Models without values, whose names and shapes are wanted only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SKIPPED = frozenset(
    (
        *("kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "constant_", "ones_", "zeros_"),
        *("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"),
    )
)


@contextmanager
def outlines() -> Iterator[None]:
    """Models made inside are on the meta device: only their names and shapes can be used.

    Initialisations are skipped. Even without values they would take most of the time.
    """
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """Skips the functions that initialise values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in _SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
