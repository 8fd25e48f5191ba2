"""Configuration of all tests; loaded by pytest before pytest-xdist starts its workers.

When yapf, which mmengine needs, is first imported in an environment, it writes its grammar to the
user's cache. If two processes did so at once, one might read an incomplete file, so it is imported
here.

Under ``nohup``, and in the background of many runners, signals are ignored that tests send. The
processes that tests start must not inherit that, while those that run the tests go on ignoring
them: a handler that does nothing is dropped by a process that starts, other than "ignore".
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import needed
import pytest

with contextlib.suppress(ImportError):
    import yapf  # noqa: F401

hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")

_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGHUP") if hasattr(signal, n)]
_IGNORED = pytest.StashKey[list[int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Ignore by a handler what was ignored when pytest began, and keep the user's own files.

    Tables of embeddings are sealed with a key of the tests, not with the user's.
    """
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers inherit it
        state = tempfile.mkdtemp(prefix="vision-backbones-tests-")
        os.environ["XDG_STATE_HOME"] = state
        owner = os.getpid()
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(state, True))
    ignored = [int(number) for number in _SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    config.stash[_IGNORED] = getattr(config, "workerinput", {}).get("ignored", ignored)
    for number in config.stash[_IGNORED]:
        signal.signal(number, lambda number, frame: None)


@pytest.fixture(autouse=True)
def replays_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, times would let some calls of fused models run plainly."""
    if calls := sys.modules.get("ops.fuse.calls"):
        monkeypatch.setattr(calls, "MEASURES", False)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist, which starts with the default handlers."""
    node.workerinput["ignored"] = node.config.stash[_IGNORED]


@pytest.fixture
def default_signals() -> Iterator[None]:
    """For tests that send signals to the process that they run in."""
    defaults = [signal.default_int_handler, signal.SIG_DFL]
    before = [signal.signal(n, default) for n, default in zip(_SIGNALS, defaults, strict=False)]
    yield
    for number, handler in zip(_SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_runs_left() -> Iterator[None]:
    """End the trainings that a test leaves running, as one that fails does."""
    yield
    if (runs := sys.modules.get("training_runs")) is not None:
        runs.end_all()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--begin-at",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="after so many of the tests, from 0 to 1; the first ones come at the end",
    )


# How many tests were left out, by the packages that they need.
_LEFT_OUT = pytest.StashKey[dict[str, int]]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of missing packages, and rotate the order of the others."""
    if left_out := {item: packages for item in items if (packages := needed.missing(item))}:
        config.stash[_LEFT_OUT] = dict(Counter(left_out.values()))
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    first = int(len(items) * config.getoption("--begin-at"))
    items[:] = items[first:] + items[:first]


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Exempt what is imported and collected, millions of objects, from garbage collections.

    Those of the tests, which took 6 % of their time, become rarer.
    """
    gc.disable()
    gc.set_threshold(20_000, 10, 10)
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, {})
    # Plugins that end now look for objects' referrers, which frozen ones hide.
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist left out; all of them collect the same tests."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[_LEFT_OUT] = left_out


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for packages, count in sorted(config.stash.get(_LEFT_OUT, {}).items()):
        terminalreporter.write_line(
            f"LEFT OUT: {count} tests that need Debian's packages {packages}, which are missing"
        )
