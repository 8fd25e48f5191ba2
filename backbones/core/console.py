"""What all command lines share: text in any encoding, errors of one line, and exit statuses."""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn, TextIO

import torch

from backbones.core.checkpoint import CheckpointError
from backbones.core.messages import first_line, one_line
from backbones.training.errors import TrainingError
from ops.cpu.build import instruction_set, is_switched_on

__all__ = [
    "CommandError",
    "Parser",
    "any_text",
    "guard",
    "memory_shortage",
]

_HANDLER = "backbones.spelled_out"
# What the commands draw with; anything else that an encoding lacks becomes an escape.
_SPELLED = {"─": "-", "✓": "v", "✗": "x", "×": "x", "·": ".", "…": "...", "→": "->", "≤": "<="}
# How PyTorch says on a CPU that there is no memory, or that no address space would hold a tensor.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|Storage size calculation overflowed|Stride calculation overflowed"
    r"|allocate memory|invalid size, try allocating"
)


class CommandError(ValueError):
    """What a user can mend; the message is one line that says how."""


class Parser(argparse.ArgumentParser):
    """Says in one line what it cannot take, without the usage, and keeps line breaks in texts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        # "argument --size: must be …" of what follows from a type is a sentence without the two.
        message = re.sub(r"^argument (\S+): (?=must )", r"\1 ", message)
        self.exit(2, f"error: {one_line(message)}\n")


def guard(command: Callable[[], int | None]) -> int:
    """The exit status of ``command``, whatever ends it.

    Its own (None counts as 0); 2 if it could not be done, for a reason that a user can mend and
    that one line on standard error says; 130 after Ctrl-C; 0 if whoever read the output has gone
    (``… | head``). Any other error is a bug and keeps its trace.
    """
    with any_text():
        status = _status(command)
        broken = _flush()
        if broken is None or isinstance(broken, BrokenPipeError):
            return status
        return _fail(_unwritten(broken))


def _status(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as leaving:  # argparse: 0 after --help, 2 after what it cannot take
        return _fail(leaving.code) if isinstance(leaving.code, str) else leaving.code or 0
    except BrokenPipeError:
        return 0
    except (CommandError, CheckpointError, TrainingError) as error:
        return _fail(str(error))
    except OSError as error:
        # Of a file it would have a name; what is left is standard output.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None
        return _fail(_unwritten(error) if full else str(error))
    except ValueError as error:
        if str(error) != _environment_fault():
            raise
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        shortage = memory_shortage(error)
        if shortage is None:
            raise
        return _fail(shortage)


def _environment_fault() -> str | None:
    """What is wrong with the variables that kernels are chosen by, in words; None if nothing."""
    try:
        is_switched_on()
        instruction_set()
    except ValueError as error:
        return str(error)
    return None


def memory_shortage(error: BaseException) -> str | None:
    """What to say of an error if it is that memory does not suffice; None for other errors."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not _NO_MEMORY.search(text):
        return None
    return f"not enough memory: {first_line(error)}" if text else "not enough memory"


@contextmanager
def any_text() -> Iterator[None]:
    """Standard output and error take text that their encoding lacks (cp1252, ASCII, names of files
    that are no text): marks are spelled out, other characters become escapes as in Python.
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


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escapes = (_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(escapes), error.end


codecs.register_error(_HANDLER, _spell_out)


def _fail(reason: str) -> int:
    with suppress(OSError):
        sys.stderr.write(f"error: {one_line(reason)}\n")
    return 2


def _unwritten(broken: OSError) -> str:
    return f"cannot write the output: {broken.strerror}"


def _flush() -> OSError | None:
    """The error if the streams cannot be written; what is left of them goes nowhere then."""
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
