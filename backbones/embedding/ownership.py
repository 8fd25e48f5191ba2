"""Tells the user's own tables from others', which are not trusted to say where images are.

A table that comes from elsewhere could name any folder as its source, and put what lies there into
a report. So ``embed`` seals a table's description with a key that only the user can read
(HMAC-SHA-256), and the source of a table without that seal is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones.embedding.table import identity
from ops.cpu.build.folders import is_own_file

_BYTES = 32


def key_path() -> Path:
    """The file of the user's key; RuntimeError without a home folder."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "vision-backbones" / "tables.key"


def seal(content: Mapping[str, Any]) -> str | None:
    """The seal of a table's metadata; None if no key can be stored."""
    with contextlib.suppress(OSError, RuntimeError):
        if _key() is None:
            _make_key(key_path())
    key = _key()
    return None if key is None else _sealed(key, content)


def is_own(content: Mapping[str, Any]) -> bool:
    """Whether this user sealed the metadata, on this machine or with the same home folder."""
    key, there = _key(), content.get("seal")
    if key is None or there is None:
        return False
    return hmac.compare_digest(os.fsencode(there), os.fsencode(_sealed(key, content)))


def _sealed(key: bytes, content: Mapping[str, Any]) -> str:
    told = json.dumps([identity(dict(content)), content["source"]], sort_keys=True)
    return hmac.new(key, told.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """The stored key; None if there is none, or others could have written it."""
    try:
        path = key_path()
        key = path.read_bytes() if is_own_file(path) else b""
    except (OSError, RuntimeError):
        return None
    return key if len(key) == _BYTES else None


def _make_key(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # readable by the user alone
    with open(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_BYTES))
    os.replace(temporary, path)
