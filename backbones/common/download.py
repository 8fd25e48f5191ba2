"""Downloading of weight files into a cache."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from backbones.common.checkpoint_files import CheckpointError, DamagedFileError

# Timeout in seconds for the server's response and between chunks.
TIMEOUT = 30.0
_CHUNK = 1 << 17
_LONGEST_NAME = 100
_UNSAFE = re.compile(r"[^\w.+=-]")  # in a file's name
# File names of OpenMMLab, torchvision and timm contain the first digits of the SHA-256. Eight
# decimal digits are a date.
_HASH = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8}|[0-9a-f]{64})\.")


def is_url(source: str) -> bool:
    """Whether a source of weights is an http(s) URL."""
    return source.lower().startswith(("http://", "https://"))


@contextmanager
def downloaded(url: str, label: str = "", cache_dir: str | Path | None = None) -> Iterator[Path]:
    """The file at ``url``, downloaded to the cache atomically unless it is there.

    If the caller raises a :class:`DamagedFileError`, the file is deleted from the cache. That is
    torch hub's by default; ``label`` is a prefix of the file's name. A ConnectionError says what to
    fetch and where to put it.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / file_name(url, label)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        checksum = _HASH.search(_base_name(url))
        fetch(url, path, checksum[1] if checksum else "")
    try:
        yield path
    except DamagedFileError as error:
        path.unlink(missing_ok=True)
        raise DamagedFileError(
            f"{error}; the download from {url} was deleted, and the next call repeats it"
        ) from error


def file_name(url: str, label: str = "") -> str:
    """The name of a download in the cache.

    It depends on the whole URL, since many end in the same name or differ only in the query.
    """
    key = hashlib.sha256(url.encode()).hexdigest()[:10]
    base = _UNSAFE.sub("_", _base_name(url))[-_LONGEST_NAME:]
    return "-".join(filter(None, (label, key, base)))


def _base_name(url: str) -> str:
    return url.partition("?")[0].partition("#")[0].rstrip("/").rpartition("/")[2]


def fetch(url: str, path: Path, checksum: str = "") -> None:
    """Download ``url`` to ``path`` atomically; ``checksum`` is a prefix of the SHA-256 in hex."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    digest = hashlib.sha256()
    try:
        with open(temporary, "xb") as file, closing(_receive(url, path)) as chunks:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
        if not (found := digest.hexdigest()).startswith(checksum):
            raise CheckpointError(
                f"the download from {url} was discarded: its SHA-256 begins with "
                f"{found[: len(checksum)]}, not with {checksum} as its name says"
            )
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, ConnectionError) or error.filename is not None:
            raise
        raise OSError(
            error.errno, error.strerror, str(path)
        ) from error  # a full disk names no file
    finally:
        temporary.unlink(missing_ok=True)


def _receive(url: str, path: Path) -> Generator[bytes]:
    """The bytes at ``url``, with a progress bar on a terminal."""
    try:
        request = Request(url, headers={"User-Agent": "vision-backbones"})
        with urlopen(request, timeout=TIMEOUT) as response:
            expected = getattr(response, "length", None)
            with tqdm(
                total=expected, desc=path.name, unit="B", unit_scale=True, disable=None
            ) as bar:
                received = 0
                while chunk := response.read(_CHUNK):
                    received += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
        if expected is not None and received != expected:
            raise ConnectionError(f"it stopped after {received} of {expected} bytes")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        silent = isinstance(error, TimeoutError) or isinstance(
            getattr(error, "reason", None), TimeoutError
        )
        reason = f"the server sent nothing for {TIMEOUT:g} s" if silent else error
        raise ConnectionError(
            f"could not download {url} ({reason}); download it elsewhere and save it as {path}"
        ) from error
