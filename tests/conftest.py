"""What concerns all tests; loaded by pytest before pytest-xdist starts its workers.

At its first import in an environment yapf, which mmengine needs, writes its grammar to the user's
cache; of two processes that do so at once, one may read half of it.
"""

from __future__ import annotations

import contextlib

import pytest

with contextlib.suppress(ImportError):
    import yapf  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--begin-at",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="after so many of the tests, from 0 to 1; the first ones come at the end",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Turn the order, once it is known which tests there are."""
    first = int(len(items) * config.getoption("--begin-at"))
    items[:] = items[first:] + items[:first]
