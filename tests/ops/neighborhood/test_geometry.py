"""The windows of one axis against the definition, spelled out."""

from __future__ import annotations

import itertools

import pytest
from neighborhood_oracle import window

from ops.neighborhood._geometry import axis_windows, window_of


def _parameters(sizes: range) -> list[tuple[int, int, int, int, bool]]:
    return [
        (n, k, s, d, causal)
        for n in sizes
        for k in range(1, n + 1)
        for s in range(1, k + 1)
        for d in range(1, n // k + 1)
        for causal in (False, True)
    ]


def test_windows_of_every_small_axis() -> None:
    for n, k, s, d, causal in _parameters(range(1, 13)):
        start, length = (t.tolist() for t in axis_windows(n, k, s, d, causal))
        for i in range(n):
            positions = [place * d + i % d for place in range(start[i], start[i] + length[i])]
            assert positions == window(i, n, k, s, d, causal), (n, k, s, d, causal, i)
            of_group = window_of(i // d, (n - i % d + d - 1) // d, k, s, causal)
            assert of_group == (start[i], length[i])


@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_are_monotonic_and_cover_all_keys(is_causal: bool) -> None:
    for n, k, s, d, causal in _parameters(range(1, 25)):
        if d > 1 or causal != is_causal:
            continue
        windows = [window(i, n, k, s, d, causal) for i in range(n)]
        assert all(windows)
        for before, after in itertools.pairwise(windows):
            assert before[0] <= after[0]
            assert before[-1] <= after[-1]
        assert set().union(*windows) == set(range(n))
