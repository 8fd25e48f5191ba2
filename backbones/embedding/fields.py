"""The fields of ``metadata.json``, with their types and ranges."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from backbones.common.checks import Check, one_of, optional, several, text, whole
from backbones.common.dtypes import COMPUTED
from backbones.common.images import DECODERS
from backbones.common.messages import shown

STORED = ("float32", "float16")
"""The dtypes of stored embeddings."""

_MOST_DIM = 2**31 - 1  # of Arrow's lists of fixed size
_MOST = 2**63 - 1


def check_fields(content: Mapping[str, Any]) -> None:
    """Check the fields of a ``metadata.json``; those without a rule are ignored."""
    for key, check in _RULES.items():
        within, _, name = key.rpartition(".")
        check(key, (content[within] if within else content).get(name))
    source = content["source"]
    for key in _NEEDED.get(source["kind"], ()):
        if source.get(key) is None:
            raise ValueError(f"source.{key} is missing")
    if math.prod(content["shape"]) != content["dim"]:
        raise ValueError(
            f"dim must be the product of shape, {content['shape']}, not {content['dim']}"
        )


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


_RULES: dict[str, Check] = {
    **{"model": _text, "weights": _object, "preprocessing": _object, "features": _text},
    **{"shape": several(whole(1, _MOST_DIM)), "dim": whole(1, _MOST_DIM), "dtype": one_of(*STORED)},
    **{"computed": one_of(*COMPUTED), "classes": whole(0, _MOST_DIM), "source": _object},
    **{"images": optional(whole(0, _MOST)), "shards": whole(0, _MOST), "rows": whole(1, _MOST)},
    **{"names": optional(several(_text, may_be_empty=True)), "versions": optional(_object)},
    **{"decoder": optional(one_of(*DECODERS)), "seal": optional(_text)},
    **{"weights.file": _text, "weights.path": optional(_path), "weights.sha256": _text},
    **{"source.kind": _text, "source.path": _path, "source.list": optional(_path)},
    **{"source.column": optional(_text), "source.folder": optional(_path)},
    **dict.fromkeys(("source.digest", "source.data", "source.split"), optional(_text)),
}
# What the readers of some kinds of sources need.
_NEEDED = {"parquet": ("column",), "training": ("data", "split")}
