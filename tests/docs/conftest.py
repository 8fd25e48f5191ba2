"""What pages read; the built site, a server of it, and Debian's Chromium to look at it with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import needed
import pytest
import site_building
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from stand_ins import Shelf


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """What the pages' commands and code read."""
    return Shelf(tmp_path_factory.mktemp("shelf"))


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's folder of temporary files, which the workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder


_BUILDER = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start building the site if a test will look at it, so that no worker has to wait for it."""
    if session.config.option.collectonly or os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        return
    if any("site" in getattr(item, "fixturenames", ()) for item in session.items):
        factory = session.config._tmp_path_factory  # type: ignore[attr-defined]
        command = [sys.executable, site_building.__file__, str(_shared(factory))]
        # The fixture reports a failure.
        session.config.stash[_BUILDER] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    """End a builder that nobody has waited for, with its child process."""
    if builder := config.stash.get(_BUILDER, None):
        if builder.poll() is None:
            os.killpg(builder.pid, signal.SIGKILL)
        builder.wait()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site."""
    return site_building.build_site(_shared(tmp_path_factory))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, ``http://127.0.0.1:PORT``."""
    handler = partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(timeout=60)


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium, which keeps a log of its console and of its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = needed.browser()
    for argument in (
        "--headless=new",
        "--no-sandbox",  # root, as in a container, has no user namespace for it
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("perfLoggingPrefs", {"enablePage": False})  # only requests
    driver = webdriver.Chrome(options=options, service=Service(shutil.which(needed.DRIVER)))
    driver.set_page_load_timeout(100)
    driver.set_script_timeout(100)
    yield driver
    driver.quit()
