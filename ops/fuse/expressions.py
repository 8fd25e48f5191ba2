"""Integers as functions of sizes: found from samples, evaluated for other sizes.

An integer that was seen at several sizes is an expression of those sizes, or of integers that are:
a multiple, a quotient (as a convolution's output size is), a product, a sum, or a remainder. The
first one that gives all samples is taken, so whoever relies on it at another size must know, or
check, that it is right there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

__all__ = ["Expressions"]

_LARGEST_DIVISOR = 64
_LARGEST_STRIDE = 4  # of windows with any padding
_LARGEST_FACTOR = 4  # of a size to which something is added

_Samples = tuple[int, ...]  # of one integer, a value for each sample
_Rule = tuple[str, tuple[int, ...]]

# Of the integers so far and a rule's own numbers.
_RULES: dict[str, Callable[..., int]] = {
    "multiple": lambda v, a, p, q: v[a] * p // q,
    "quotient": lambda v, a, c, d: (v[a] + c) // d,
    "product": lambda v, a, b, p, q: v[a] * v[b] * p // q,
    "linear": lambda v, a, p, c: v[a] * p + c,
    "sum": lambda v, a, b, sign: v[a] + sign * v[b],
    "remainder": lambda v, a, sign, d: sign * v[a] % d,
}


class Expressions:
    """Integers that are functions of given ones.

    Args:
        given: the samples of each given integer.

    Attributes:
        samples: of all integers that vary, in the order of their numbers.
    """

    def __init__(self, given: Sequence[_Samples]) -> None:
        self._given = [*given]
        self.samples: list[_Samples] = []
        self._numbers: dict[_Samples, int] = {}
        self._by_ratio: dict[_Samples, int] = {}
        self._rules: list[_Rule] = []
        self._places: list[int] = []  # among the given ones, of those that are known
        for place, samples in enumerate(given):
            if len({*samples}) > 1 and samples not in self._numbers:
                self._places.append(place)
                self._add(samples)

    def number_of(self, samples: _Samples) -> int | None:
        """The number of an integer that had these values; None if no expression gives them."""
        if samples in self._numbers:
            return self._numbers[samples]
        rule = next(self._fitting(samples), None)
        if rule is None:
            return None
        self._rules.append(rule)
        return self._add(samples)

    def covers(self, given: Sequence[int]) -> bool:
        """Whether the samples vary enough to tell what other given integers lead to.

        Those that never varied have to be as they were, those that were always equal have to be
        equal, and a size of one, which broadcasts, must have been one in a sample.
        """
        for value, samples in zip(given, self._given, strict=True):
            number = self._numbers.get(samples)
            alike = samples[0] if number is None else given[self._places[number]]
            if value != alike or value < 1 or (value == 1) > (1 in samples):
                return False
        return True

    def evaluate(self, given: Sequence[int]) -> list[int]:
        """All integers, in the order of their numbers."""
        values = [given[place] for place in self._places]
        for kind, numbers in self._rules:
            values.append(_RULES[kind](values, *numbers))
        return values

    def _add(self, samples: _Samples) -> int:
        number = self._numbers[samples] = len(self.samples)
        self.samples.append(samples)
        self._by_ratio.setdefault(_ratio(samples), number)
        return number

    def _fitting(self, samples: _Samples) -> Iterator[_Rule]:
        """Rules that give these values, the likeliest first."""
        number = self._by_ratio.get(_ratio(samples))
        if number is not None:
            yield "multiple", (number, *_fraction(samples, self.samples[number]))
        for a, known in enumerate(self.samples):
            for d in range(2, _LARGEST_DIVISOR + 1):
                yield from _quotients(samples, a, known, d)
        for a, known in enumerate(self.samples):
            if all(known) and not any(s % k for s, k in zip(samples, known, strict=True)):
                rest = tuple(s // k for s, k in zip(samples, known, strict=True))
                b = self._by_ratio.get(_ratio(rest))
                if b is not None:
                    yield "product", (a, b, *_fraction(rest, self.samples[b]))
        for a, known in enumerate(self.samples):
            for p in (1, -1, *range(2, _LARGEST_FACTOR + 1)):
                constants = {s - p * k for s, k in zip(samples, known, strict=True)}
                if len(constants) == 1:
                    yield "linear", (a, p, constants.pop())
        for a, known in enumerate(self.samples):
            for sign in (1, -1):
                rest = tuple(sign * (s - k) for s, k in zip(samples, known, strict=True))
                if rest in self._numbers:
                    yield "sum", (a, self._numbers[rest], sign)
        for a, known in enumerate(self.samples):
            for d in range(max(samples) + 1, _LARGEST_DIVISOR + 1):
                for sign in (-1, 1):
                    if all(sign * k % d == s for s, k in zip(samples, known, strict=True)):
                        yield "remainder", (a, sign, d)


def _quotients(samples: _Samples, a: int, known: _Samples, d: int) -> Iterator[_Rule]:
    """``(a + c) // d``: rounded down, rounded up, or of windows with padding."""
    least = [d * s - k for s, k in zip(samples, known, strict=True)]
    low, high = max(least), min(least) + d - 1
    if low <= high:
        rounded = [c for c in (0, d - 1) if low <= c <= high]
        if rounded or d <= _LARGEST_STRIDE:
            yield "quotient", (a, rounded[0] if rounded else low, d)


def _ratio(samples: _Samples) -> _Samples:
    """What an integer has in common with its multiples."""
    divisor = math.gcd(*samples)
    return tuple(s // divisor for s in samples) if divisor else samples


def _fraction(samples: _Samples, known: _Samples) -> tuple[int, int]:
    """The factor of an integer to one with the same ratio."""
    s, k = next((s, k) for s, k in zip(samples, known, strict=True) if k)
    divisor = math.gcd(s, k)
    return s // divisor, k // divisor
