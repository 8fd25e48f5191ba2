"""Arguments passed by mistake, and the acceptable reactions of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# Never valid for any argument of any function.
NEVER: list[Any] = [b"x", 1j, object(), {}, {"x": 3}, {1}, lambda: 0, int]
# Valid for some arguments.
PERHAPS: list[Any] = [
    *(None, True, -1, 0, 3, 2.5, float("nan"), "", "x", [], (), [None], ["x"]),
    *(torch.zeros(2, 3), torch.zeros(2, 2, 8, 8, dtype=torch.int64)),
]


def complaints(function: Callable[..., Any], good: Mapping[str, Any]) -> list[str]:
    """Replace each good argument by junk; return the unacceptable reactions of ``function``.

    It may accept the junk, or raise a TypeError or ValueError that says what is wrong (or that the
    file does not exist, or that the computation is not supported). For incompatible tensors and for
    devices, torch's RuntimeError is acceptable.
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
