"""The fields of ``metadata.json``, with their types and ranges."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from backbones.common.checks import Check, one_of, several, text, whole
from backbones.common.dtypes import COMPUTED
from backbones.common.images import DECODERS
from backbones.common.messages import shown

STORED = ("float32", "float16")
"""The dtypes of stored embeddings."""

_MOST_DIM = 2**31 - 1  # of Arrow's lists of fixed size
_MOST = 2**63 - 1


def check_fields(content: Mapping[str, Any]) -> None:
    """Check the fields of a ``metadata.json``; those without a rule are ignored."""
    _check("", content, _RULES)
    for part, rules in _PARTS.items():
        _check(f"{part}.", content[part], rules)
    source = content["source"]
    for key in _NEEDED.get(source["kind"], ()):
        if source.get(key) is None:
            raise ValueError(f"source.{key} is missing")
    if math.prod(content["shape"]) != content["dim"]:
        raise ValueError(
            f"dim must be the product of shape, {content['shape']}, not {content['dim']}"
        )


def _check(within: str, content: Mapping[str, Any], rules: Mapping[str, Check]) -> None:
    for key, check in rules.items():
        name, is_optional = key.rstrip("?"), key.endswith("?")
        if name in content and not (is_optional and content[name] is None):
            check(f"{within}{name}", content[name])
        elif not is_optional:
            raise ValueError(f"{within}{name} is missing")


def _text(name: str, value: Any) -> str:
    try:
        os.fsencode(text(name, value))
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a string, got {shown(value)}") from None
    return value


def _path(name: str, value: Any) -> str:
    if "\0" in _text(name, value):
        raise ValueError(f"{name} must be a path, got {shown(value)}")
    return value


def _object(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be an object, got {shown(value)}")
    return value


# A field whose name ends in "?" may be missing or null.
_RULES: dict[str, Check] = {
    **{"model": _text, "weights": _object, "preprocessing": _object, "features": _text},
    **{"shape": several(whole(1, _MOST_DIM)), "dim": whole(1, _MOST_DIM), "dtype": one_of(*STORED)},
    **{"computed": one_of(*COMPUTED), "classes": whole(0, _MOST_DIM), "source": _object},
    **{"images?": whole(0, _MOST), "shards": whole(0, _MOST), "rows": whole(1, _MOST)},
    **{"names?": several(_text, may_be_empty=True), "decoder?": one_of(*DECODERS)},
    **{"versions?": _object, "seal?": _text},
}
_PARTS: dict[str, dict[str, Check]] = {
    "weights": {"file": _text, "path?": _path, "sha256": _text},
    "source": {
        **{"kind": _text, "path": _path, "digest?": _text, "list?": _path},
        **{"data?": _text, "split?": _text, "column?": _text, "folder?": _path},
    },
}
# What the readers of some kinds of sources need.
_NEEDED = {"parquet": ("column",), "training": ("data", "split")}
