"""Configuration of all tests; loaded by pytest before pytest-xdist starts its workers.

When yapf, which mmengine needs, is first imported in an environment, it writes its grammar to the
user's cache. If two processes did so at once, one might read an incomplete file, so it is imported
here.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Generator

import pytest

with contextlib.suppress(ImportError):
    import yapf  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    """Tables of embeddings are sealed with a key of the tests, not with the user's."""
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers inherit it
        state = tempfile.mkdtemp(prefix="vision-backbones-tests-")
        os.environ["XDG_STATE_HOME"] = state
        owner = os.getpid()
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(state, True))


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
    """Rotate the order of the collected tests."""
    first = int(len(items) * config.getoption("--begin-at"))
    items[:] = items[first:] + items[:first]


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Exempt what is imported and collected, millions of objects, from garbage collections.

    Those of the tests, which took 6 % of their time, become rarer.
    """
    gc.disable()
    if hasattr(session.config, "workerinput"):
        # A worker of pytest-xdist needs it, and it collects garbage when it is imported, which
        # takes long once torch is there.
        import hypothesis  # noqa: F401
    gc.set_threshold(20_000, 10, 10)
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    # Plugins that end now look for objects' referrers, which frozen ones hide.
    gc.unfreeze()
