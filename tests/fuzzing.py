"""What the fuzz tests share: settings, values of any kind, and damage to files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 1e308, -0.0, 0.5, 2**31, 2**63, 10**6, 10**9]),
)


def fuzz(examples: int) -> settings:
    """Settings of so many cases, always the same ones."""
    return settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def anything(words: st.SearchStrategy[str], *more: st.SearchStrategy[Any]) -> Any:
    """Whatever JSON or YAML may hold: lists and mappings of words, numbers and ``more``."""
    return st.recursive(
        st.one_of(st.none(), st.booleans(), NUMBERS, words, *more),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.one_of(words, *more), inner, max_size=3)
        ),
        max_leaves=6,
    )


_LARGE = [0, 1, 99, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 10**5, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
_KINDS = ["cut", "bit", "bit", "bytes", "number", "zeros", "put in", "left out"]


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A function that cuts a file, changes some of its bits, bytes or numbers, or moves a part."""
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        number = struct.pack(draw(st.sampled_from([">I", "<I"])), draw(st.sampled_from(_LARGE)))
        new = number if (kind := draw(st.sampled_from(_KINDS))) == "number" else None
        # Heads, directories and footers, which say most about a file, lie at its ends.
        place = draw(st.sampled_from([32, 900, 1 << 30])), draw(st.booleans())
        share, count = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
        steps.append((kind, *place, share, new or draw(st.binary(min_size=1, max_size=8)), count))

    def change(data: bytes) -> bytes:
        for kind, most, from_the_end, share, new, count in steps:
            if not data:
                break
            place = int(share * min(most, len(data)))
            place = len(data) - 1 - place if from_the_end else place
            before, rest = data[:place], data[place:]
            data = {
                "cut": before,
                "bit": before + bytes([rest[0] ^ 1 << count % 8]) + rest[1:],
                "bytes": before + new + rest[len(new) :],
                "number": before + new + rest[len(new) :],
                "zeros": before + bytes(min(count, len(rest))) + rest[count:],
                "put in": before + new + rest,
                "left out": before + rest[count:],
            }[kind]
        return data

    return change
