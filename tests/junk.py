"""What people pass by mistake, and what a function may say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# No argument of any function is one of these.
NEVER: list[Any] = [b"x", 1j, object(), {}, {"x": 3}, {1}, lambda: 0, int]
# Some argument may be one of these.
PERHAPS: list[Any] = [
    *(None, True, -1, 0, 3, 2.5, float("nan"), "", "x", [], (), [None], ["x"]),
    *(torch.zeros(2, 3), torch.zeros(2, 2, 8, 8, dtype=torch.int64)),
]


def complaints(function: Callable[..., Any], good: Mapping[str, Any]) -> list[str]:
    """What ``function`` does of junk in place of any one of its good arguments that it must not.

    It may take it, or say in a TypeError or ValueError what is wrong with it (or that there is no
    such file, or no such way to compute); of tensors that do
    not fit each other and of devices torch speaks for itself, in a RuntimeError.
    """
    function(**good)
    found = []
    for name in good:
        for value in (*NEVER, *PERHAPS):
            try:
                function(**{**good, name: value})
            except (TypeError, ValueError, NotImplementedError, FileNotFoundError):
                continue
            except RuntimeError as error:
                if isinstance(value, torch.Tensor) or name == "device":
                    continue
                found.append(f"{name}={value!r:.40}: {error!r:.200}")
            except Exception as error:
                found.append(f"{name}={value!r:.40}: {error!r:.200}")
    return found
