"""Reading of weight files, without executing code in them, and only if they are intact."""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

_ZIP = b"PK\x03\x04"
# Files of torch.save from 0.2 until 1.6 begin with this number, pickled.
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY = (_MAGIC.to_bytes(10, "little"), f"L{_MAGIC}L".encode())
_HEAD = 512
_CHUNK = 1 << 20
_FOLDER = 0x10  # in the attributes of DOS
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|\?xml|html|head|body|!--)", re.IGNORECASE)
_BLOCKED = re.compile(r"GLOBAL (\S+)")


class CheckpointError(ValueError):
    """A checkpoint that can't be read or does not fit the model."""


class DamagedFileError(CheckpointError):
    """A file that is truncated, corrupt or not a checkpoint; another copy may be intact."""


class _LogBuffer:
    """Replaces mmengine's log buffers, whose content is not needed."""

    def __setstate__(self, state: Any) -> None:
        """Discard the state."""


def _statistic(owner: Any, name: str) -> Any:
    """Replaces ``getattr`` in pickles, which may only access statistics of log buffers."""
    if name not in ("min", "max", "current", "mean"):
        raise ValueError(f"a checkpoint may not read {name!r} of {owner!r}")
    return getattr(owner, name, None)


def _harmless() -> Iterator[Any]:
    """Types of plain values that training scripts save next to the tensors."""
    yield from (argparse.Namespace, pathlib.PurePosixPath, pathlib.PosixPath)
    yield pathlib.PureWindowsPath
    yield from (np.ndarray, np.dtype)
    yield from (type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?"))
    for made, name in ((np.empty(0), "_reconstruct"), (np.float64(0), "scalar")):
        # NumPy 2 moved these; checkpoints contain the old or the new name.
        for module in ("numpy.core", "numpy._core"):
            yield made.__reduce__()[0], f"{module}.multiarray.{name}"
    yield _statistic, "builtins.getattr"


# Allowed in weights-only loading besides tensors: all that mmengine saves except its log buffers.
HARMLESS: tuple[Any, ...] = tuple(_harmless())
LOG_BUFFER = "mmengine.logging.history_buffer.HistoryBuffer"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_file(path: Path) -> Any:
    """The content of a weight file, on the CPU.

    The format, safetensors or that of ``torch.save``, is detected from the content, not the name.
    Pickles are read with ``weights_only=True``, so that files that would execute code are rejected.
    In zip files (``torch.save`` since torch 1.6), all checksums are verified; older files and
    safetensors have none. A file with more than tensors and plain values is a CheckpointError.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        size = file.seek(0, 2)
    if head.startswith(_ZIP):
        check_archive(path)
        return _load_pickle(path)
    if any(magic in head[:32] for magic in _LEGACY):
        return _load_pickle(path)
    if path.suffix == ".safetensors" or _starts_as_safetensors(head, size):
        try:
            return load_file(path)
        except Exception as error:  # arbitrary bytes may cause any exception
            reason = _what_else(head) or f"is not a complete safetensors file: {_one_line(error)}"
            raise DamagedFileError(f"{path} {reason}") from error
    raise DamagedFileError(
        f"{path} {_what_else(head) or 'is neither a torch.save file nor safetensors'}"
    )


def check_archive(path: Path) -> None:
    """Verify all checksums in a zip file, which torch's own reader does not."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if len(set(archive.namelist())) < len(archive.namelist()):
                    raise zipfile.BadZipFile("two members of the same name")
                for member in archive.infolist():
                    if member.external_attr & _FOLDER and not member.is_dir():
                        # torch would skip it and leave memory uninitialised.
                        raise zipfile.BadZipFile(f"{member.filename} is marked as a folder")
                    with archive.open(member) as content:
                        while content.read(_CHUNK):
                            pass
        except Exception as error:  # arbitrary bytes may cause any exception
            reason = _one_line(error)
            raise DamagedFileError(f"{path} is truncated or corrupt: {reason}") from error


def _load_pickle(path: Path) -> Any:
    try:
        # Exclude globals that are already allowed, since leaving the context removes them.
        always = torch.serialization.get_safe_globals()
        allowed = [k for k in (*HARMLESS, (_LogBuffer, LOG_BUFFER)) if k not in always]
        with (
            open(path, "rb") as file,
            torch.serialization.safe_globals(allowed),
            warnings.catch_warnings(),
        ):
            # Protocols other than 2 load as well, or raise their own error.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            # Pass the open file: given a path, torch decides by the suffix.
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes may cause any exception
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which contains code; save only the model's "
                "state_dict() and load that"
            ) from error
        if blocked := _BLOCKED.search(str(error)):
            raise CheckpointError(
                f"{path} contains more than tensors and plain values: {blocked[1]}; it was not "
                "executed. If you trust it, save only its state dict and load that."
            ) from error
        raise DamagedFileError(
            f"{path} is truncated or not a checkpoint: {_one_line(error)}"
        ) from error


def _starts_as_safetensors(head: bytes, size: int) -> bool:
    """Whether it begins with a header length in eight bytes, followed by JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _what_else(head: bytes) -> str:
    """What kind of file it is instead of a checkpoint, if that can be detected."""
    if not head:
        return "is empty"
    if _MARKUP.match(head):
        return "is a web page, not a checkpoint; perhaps an error or log-in page"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not a checkpoint: `git lfs pull` downloads the file"
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        return (
            "is a bare pickle, not a torch.save file; it was not executed. If you trust it, load "
            "it where it was created and save its state dict with torch.save."
        )
    return ""


def _one_line(error: Exception) -> str:
    """The reason without torch's advice to trust the file."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = text.replace("Weights only load failed.", "").strip().splitlines() or [""]
    return lines[0] if lines[0] and "weights_only" not in lines[0] else type(error).__name__
