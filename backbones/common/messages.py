"""Formatting of foreign text (names, values, errors of libraries) for one-line messages."""

from __future__ import annotations

import re
import reprlib

_LONGEST = 1500  # a message
_LONGEST_SHOWN = 200  # a value in it
_REPR = reprlib.Repr()  # YAML's references let a short file hold a huge value
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 60
_REPR.maxlevel = 3
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str, longest: int = _LONGEST) -> str:
    """``text`` with escaped line breaks and control characters, truncated if it is long."""
    text = _BREAKS.sub(lambda found: ascii(found[0])[1:-1], text)
    return text if len(text) <= longest else f"{text[:longest]} …"


def joined_lines(text: object, longest: int = _LONGEST) -> str:
    """Multi-line text or an error as one line, with single spaces between words."""
    return one_line(" ".join(str(text).split()) or type(text).__name__, longest)


def first_line(error: BaseException) -> str:
    """The first line of another library's error; the rest is advice to programmers."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0]) if lines else type(error).__name__


def shown(value: object) -> str:
    """``repr``, shortened."""
    return joined_lines(_REPR.repr(value), _LONGEST_SHOWN)
