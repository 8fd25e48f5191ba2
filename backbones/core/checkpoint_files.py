"""Files of weights, read without running anything in them, and only if they are whole."""

from __future__ import annotations

import argparse
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

__all__ = [
    "HARMLESS",
    "LOG_BUFFER",
    "CheckpointError",
    "DamagedFileError",
    "check_archive",
    "read_file",
]

_ZIP = b"PK\x03\x04"
# What torch.save writes first since 0.2 and before 1.6: this number, pickled.
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY = (_MAGIC.to_bytes(10, "little"), f"L{_MAGIC}L".encode())
_HEAD = 512
_CHUNK = 1 << 20
_FOLDER = 0x10  # in the attributes of DOS
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|\?xml|html|head|body|!--)", re.IGNORECASE)
_BLOCKED = re.compile(r"GLOBAL (\S+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


class DamagedFileError(CheckpointError):
    """A file that is truncated, corrupt or no checkpoint at all: another copy may be better."""


class _LogBuffer:
    """In place of mmengine's log buffers, whose content is of no use here."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


def _statistic(owner: Any, name: str) -> Any:
    """What a pickle's ``getattr`` may do: name a statistic of a log buffer."""
    if name not in ("min", "max", "current", "mean"):
        raise ValueError(f"a checkpoint may not read {name!r} of {owner!r}")
    return getattr(owner, name, None)


def _harmless() -> Iterator[Any]:
    """Plain values that training scripts leave in their checkpoints beside the tensors."""
    yield from (argparse.Namespace, pathlib.PurePosixPath, pathlib.PosixPath)
    yield pathlib.PureWindowsPath
    yield from (np.ndarray, np.dtype)
    yield from (type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?"))
    for made, name in ((np.empty(0), "_reconstruct"), (np.float64(0), "scalar")):
        # NumPy 2 moved these; a checkpoint holds the name of the version that wrote it.
        for module in ("numpy.core", "numpy._core"):
            yield made.__reduce__()[0], f"{module}.multiarray.{name}"
    yield _statistic, "builtins.getattr"


# What weights-only loading may meet besides tensors: all that mmengine saves but its log buffers.
HARMLESS: tuple[Any, ...] = tuple(_harmless())
LOG_BUFFER = "mmengine.logging.history_buffer.HistoryBuffer"


def read_file(path: Path) -> Any:
    """What a file of weights holds, on the CPU.

    Its content, not its name, says how to read it: as safetensors, or as what ``torch.save``
    writes. Pickles are read with ``weights_only=True``, so that a file that would run code is
    refused. Of zips (``torch.save`` since torch 1.6) every checksum is compared; older files and
    safetensors have none.

    Raises:
        DamagedFileError: truncated, corrupt, or no file of weights.
        CheckpointError: it holds more than tensors and plain values.
        OSError: it cannot be opened.
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
        except Exception as error:  # whatever a reader makes of bytes that are no such file
            reason = _what_else(head) or f"is not a whole safetensors file: {_one_line(error)}"
            raise DamagedFileError(f"{path} {reason}") from error
    raise DamagedFileError(
        f"{path} {_what_else(head) or 'is neither a file of torch.save nor safetensors'}"
    )


def check_archive(path: Path) -> None:
    """Compare the checksum of everything in a zip, which torch's own reader does not.

    Raises:
        DamagedFileError: a wrong checksum, or no complete zip.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if len(set(archive.namelist())) < len(archive.namelist()):
                    raise zipfile.BadZipFile("two members of one name")
                for member in archive.infolist():
                    if member.external_attr & _FOLDER and not member.is_dir():
                        # torch would read nothing of it, and leave the memory as it was.
                        raise zipfile.BadZipFile(f"{member.filename} is marked as a folder")
                    with archive.open(member) as content:
                        while content.read(_CHUNK):
                            pass
        except Exception as error:  # whatever a reader makes of bytes that are no zip
            reason = _one_line(error)
            raise DamagedFileError(f"{path} is truncated or corrupt: {reason}") from error


def _load_pickle(path: Path) -> Any:
    try:
        # Not what is allowed anyway: leaving the context would forbid it.
        always = torch.serialization.get_safe_globals()
        allowed = [k for k in (*HARMLESS, (_LogBuffer, LOG_BUFFER)) if k not in always]
        with (
            open(path, "rb") as file,
            torch.serialization.safe_globals(allowed),
            warnings.catch_warnings(),
        ):
            # Protocols other than 2 load as well, or fail with an error of their own.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            # Not by its path: torch goes by the name's ending.
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader makes of bytes that are no pickle
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which holds code; save the state_dict() of the "
                "model alone and load that"
            ) from error
        if blocked := _BLOCKED.search(str(error)):
            raise CheckpointError(
                f"{path} holds more than tensors and plain values: {blocked[1]}; it "
                "was not run. If you trust it, save its state dict alone and load that."
            ) from error
        raise DamagedFileError(
            f"{path} is truncated or not a checkpoint: {_one_line(error)}"
        ) from error


def _starts_as_safetensors(head: bytes, size: int) -> bool:
    """A header's length of eight bytes, and the JSON that it is of."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _what_else(head: bytes) -> str:
    """What a file is that is no checkpoint, if that can be told."""
    if not head:
        return "is empty"
    if _MARKUP.match(head):
        return "is a web page, not a checkpoint: an error or a log-in, perhaps, in its place"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not a checkpoint: `git lfs pull` fetches the file itself"
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        return (
            "is a bare pickle, not a file of torch.save; it was not run. If you trust it, load it "
            "where it was made and save its state dict by torch.save."
        )
    return ""


def _one_line(error: Exception) -> str:
    """The reason alone, without torch's advice to trust the file."""
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = text.replace("Weights only load failed.", "").strip().splitlines() or [""]
    return lines[0] if lines[0] and "weights_only" not in lines[0] else type(error).__name__
