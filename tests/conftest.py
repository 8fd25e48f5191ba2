"""Loaded by pytest before pytest-xdist starts its workers.

At its first import in an environment yapf, which mmengine needs, writes its grammar to the user's
cache; of two processes that do so at once, one may read half of it.
"""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):
    import yapf  # noqa: F401
