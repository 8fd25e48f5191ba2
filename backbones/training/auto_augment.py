"""Validation of timm's augmentation policies, the key ``aa``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from backbones.common.errors import RecipeError
from backbones.common.keys import Range
from backbones.common.messages import shown

_FLAG = Range(low=0, high=1)
_MAGNITUDE, _NOISE = Range(low=0, high=30), Range(low=0, high=1000)
_FIXED = ("original", "originalr", "v0", "v0r", "3a")
_SECTIONS: Mapping[str, Mapping[str, tuple[type, Range]]] = {
    "rand": {
        "m": (int, _MAGNITUDE),
        "n": (int, Range(low=1, high=10)),
        "p": (float, Range(low=0, high=1)),
        "mstd": (float, _NOISE),
        "mmax": (int, Range(low=1, high=30)),
        "inc": (int, _FLAG),
    },
    "augmix": {
        "m": (int, _MAGNITUDE),
        "w": (int, Range(low=1, high=10)),
        "d": (int, Range(low=1, high=10)),
        "a": (float, Range(low=0.01, high=1000)),
        "b": (int, _FLAG),
        "mstd": (float, _NOISE),
    },
    **{name: {"mstd": (float, _NOISE)} for name in _FIXED},
}
# RandAugment's sets of operations; timm uses its default for unknown names.
_SETS = ("tweights", "t3a", "t3aw")


def check_policy(text: str) -> None:
    """Reject a policy that timm would misinterpret, partly ignore, or take forever to apply."""
    name, *sections = text.split("-")
    if name not in _SECTIONS:
        raise RecipeError(f"aa must be a policy of {', '.join(_SECTIONS)}, not {shown(text)}")
    known = _SECTIONS[name]
    for section in sections:
        if name == "rand" and section in _SETS:
            continue
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section, re.ASCII)
        if match is None or match[1] not in known:
            right = ", ".join([f"{key}NUMBER" for key in known] + list(_SETS) * (name == "rand"))
            raise RecipeError(
                f"aa {shown(text)}: {name} must be followed by {right}, not {shown(section)}"
            )
        kind, span = known[match[1]]
        if (kind is int and "." in match[2]) or not span.holds(kind(match[2])):
            whole = "a whole number " if kind is int else ""
            raise RecipeError(f"aa {shown(text)}: {match[1]} must be {whole}{span}")
