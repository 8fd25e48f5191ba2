"""What ``metadata.json`` may say: the type and the range of each of its fields."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from backbones.common.dtypes import COMPUTED
from backbones.common.images import DECODERS
from backbones.common.messages import shown

__all__ = ["STORED", "problem"]

STORED = ("float32", "float16")
"""The dtypes of stored embeddings."""

_MOST_DIM = 2**31 - 1  # of Arrow's lists of fixed size
_MOST = 2**63 - 1

# Each says what a value must be, or None if it is.
_Check = Callable[[Any], "str | None"]


def problem(content: Mapping[str, Any]) -> str | None:
    """The first field that cannot be so, with its value; None if there is none.

    Args:
        content: of the file; fields without a rule are ignored.
    """
    for key, check in _RULES.items():
        if (found := _broken(key, content, check)) is not None:
            return found
    for part, rules in _PARTS.items():
        for key, check in rules.items():
            if (found := _broken(key, content[part], check)) is not None:
                return f"{part}: {found}"
    source = content["source"]
    lacking = [key for key in _NEEDED.get(source["kind"], ()) if source.get(key) is None]
    if lacking:
        return f"source: {lacking[0]} is missing"
    if math.prod(content["shape"]) != content["dim"]:
        return f"dim must be the product of shape, {content['shape']}, not {content['dim']}"
    return None


def _broken(key: str, content: Mapping[str, Any], check: _Check) -> str | None:
    optional = key.endswith("?")
    name = key.rstrip("?")
    if name not in content or (optional and content[name] is None):
        return None if optional else f"{name} is missing"
    must = check(content[name])
    return None if must is None else f"{name} must be {must}, not {shown(content[name])}"


def _whole(low: int, high: int = _MOST) -> _Check:
    def check(value: Any) -> str | None:
        fits = type(value) is int and low <= value <= high
        limit = f"from {low} to {high}" if high < _MOST else f"of at least {low}"
        return None if fits else f"a whole number {limit}"

    return check


def _one_of(*values: str) -> _Check:
    return lambda value: None if value in values else " or ".join(values)


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and _is_encodable(value) else "a text"


def _path(value: Any) -> str | None:
    return None if _text(value) is None and "\0" not in value else "a path"


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: Any) -> str | None:
    fits = isinstance(value, list) and all(_text(entry) is None for entry in value)
    return None if fits else "a list of texts"


def _sides(value: Any) -> str | None:
    side = _whole(1, _MOST_DIM)
    fits = isinstance(value, list) and 0 < len(value) < 9 and not any(map(side, value))
    return None if fits else "a list of whole numbers of at least 1"


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "an object"


_RULES: dict[str, _Check] = {
    **{"model": _text, "weights": _object, "preprocessing": _object, "features": _text},
    **{"shape": _sides, "dim": _whole(1, _MOST_DIM), "dtype": _one_of(*STORED)},
    **{"computed": _one_of(*COMPUTED), "classes": _whole(0, _MOST_DIM), "source": _object},
    **{"images?": _whole(0), "shards": _whole(0), "rows": _whole(1)},
    **{"names?": _texts, "decoder?": _one_of(*DECODERS), "versions?": _object, "seal?": _text},
}
_PARTS: dict[str, dict[str, _Check]] = {
    "weights": {"file": _text, "path?": _path, "sha256": _text},
    "source": {
        **{"kind": _text, "path": _path, "digest?": _text, "list?": _path},
        **{"data?": _text, "split?": _text, "column?": _text, "folder?": _path},
    },
}
# What the readers of some kinds of sources need.
_NEEDED = {"parquet": ("column",), "training": ("data", "split")}
