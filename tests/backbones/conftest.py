"""Fixtures of the tests in int8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ops.cpu import policy


@pytest.fixture(scope="module")
def small_layers_too() -> Iterator[None]:
    """Quantise those of small models, which stay in floats otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_FEWEST_IN_INT8", "_FEWEST_IN_INT8_OF_TILES"):
            patch.setattr(policy, name, 1)
        yield
