"""Shared by all command lines: output in any encoding, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any, NoReturn, TextIO

from backbones.common.checkpoint_files import CheckpointError
from backbones.common.errors import MendableError, memory_shortage
from backbones.common.messages import one_line
from ops.cpu import SettingError

_HANDLER = "backbones.spelled_out"
# Replacements for symbols that an encoding lacks; other characters are escaped.
_REPLACEMENTS = {
    **{"─": "-", "✓": "v", "✗": "x", "×": "x", "·": ".", "…": "...", "→": "->"},
    **{"≤": "<=", "≥": ">=", "∞": "inf", "²": "^2", "µ": "u"},
}


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage, and keeps line breaks in texts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        # Errors of types read "argument --size: must be …"; make that a sentence.
        message = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message)
        self.exit(2, f"error: {one_line(message)}\n")


def guard(command: Callable[[], int | None]) -> int:
    """Run ``command`` and return its exit status, however it ends.

    That is its own status (None means 0); 2 after errors that the user can fix, which are printed
    in one line on standard error; 130 after Ctrl-C; and 0 if the reader of the output has exited
    (``… | head``). Any other exception is a bug and propagates.
    """
    with tolerate_any_text():
        status = _status(command)
        broken = _flush()
        if broken is None or isinstance(broken, BrokenPipeError):
            return status
        return _fail(_write_failure(broken))


def _status(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as leaving:  # argparse: 0 after --help, 2 after errors
        return _fail(leaving.code) if isinstance(leaving.code, str) else leaving.code or 0
    except BrokenPipeError:
        return 0
    except (MendableError, CheckpointError, SettingError) as error:
        return _fail(str(error))
    except OSError as error:
        # Errors of files have a filename; without one, it was standard output.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None
        return _fail(_write_failure(error) if full else str(error))
    except (MemoryError, RuntimeError) as error:
        shortage = memory_shortage(error)
        if shortage is None:
            raise
        return _fail(shortage)


@contextmanager
def silence() -> Iterator[None]:
    """Silence libraries' warnings, logs and prints; what fails raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def tolerate_any_text() -> Iterator[None]:
    """Let standard output and error accept characters that their encoding lacks (cp1252, ASCII,
    undecodable file names): symbols are replaced, other characters are escaped as in Python.
    """
    with ExitStack() as after:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed before the process began
                setattr(sys, name, after.enter_context(open(os.devnull, "w", encoding="utf-8")))
                after.callback(setattr, sys, name, None)
            elif hasattr(stream, "reconfigure"):
                after.callback(_reconfigure, stream, stream.errors)
                _reconfigure(stream, _HANDLER)
        yield


def _reconfigure(stream: TextIO, errors: str) -> None:
    with suppress(OSError, ValueError):  # it flushes, and the stream may be broken or closed
        stream.reconfigure(errors=errors)  # type: ignore[attr-defined]


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escapes = (
        _REPLACEMENTS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking
    )
    return "".join(escapes), error.end


codecs.register_error(_HANDLER, _replace_unencodable)


def _fail(reason: str) -> int:
    with suppress(OSError):
        sys.stderr.write(f"error: {one_line(reason)}\n")
    return 2


def _write_failure(broken: OSError) -> str:
    return f"cannot write the output: {broken.strerror}"


def _flush() -> OSError | None:
    """Flush the streams; if that fails, discard the rest and return the error."""
    broken = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            broken = error
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    return broken
