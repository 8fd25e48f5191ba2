"""Build the site once for all workers of pytest-xdist; as a script, while other tests run.

Its argument is the folder that the workers share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]


def build_site(shared: Path) -> Path:
    """Return the folder of the site, built strictly, if need be after waiting for another process.

    Raises:
        AssertionError: mkdocs complains; with what it printed.
    """
    folder = shared / "site"
    with FileLock(shared / "site.lock", timeout=600):
        if not folder.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
            built = shared / "unfinished-site"
            run = subprocess.run(
                [*command, str(built)],
                cwd=ROOT,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
                capture_output=True,
                text=True,
                timeout=500,
            )
            assert run.returncode == 0, f"mkdocs build --strict:\n{run.stdout}{run.stderr}"
            built.rename(folder)
    return folder


def look_at(browser: Any, width: int, scheme: str = "light") -> None:
    """Give the browser's window a width, and its user a preference for light or dark."""
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


class Watch:
    """What the browser has complained of and asked for since the last look."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser, self.address = browser, address
        self.browser.get_log("browser")
        self.browser.get_log("performance")

    def check(self) -> None:
        """No error in the console, and no request but for what is below the address."""
        log = self.browser.get_log("browser")
        assert not [entry["message"] for entry in log if entry["level"] in ("SEVERE", "WARNING")]
        entries = self.browser.get_log("performance")
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        own = (self.address, "data:", "blob:", "about:")
        assert sent and all(params["request"]["url"].startswith(own) for params in sent)


if __name__ == "__main__":
    build_site(Path(sys.argv[1]))
