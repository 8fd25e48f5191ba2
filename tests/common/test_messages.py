"""Quoted values in messages fit on one line."""

from __future__ import annotations

from backbones.common.messages import first_line, joined_lines, one_line, shown


def test_lines_end():
    assert one_line("a\r\n\tb\x85\u2028é日") == "a\\r\\n\\tb\\x85\\u2028é日"
    assert len(one_line("x" * 10**6)) < 2000
    assert len(shown("9" * 10**4)) < 100
    assert len(shown(10**4000)) < 100


def test_errors_of_other_libraries_have_a_first_line():
    assert first_line(ValueError(" \nwhat\nadvice")) == "what"
    assert first_line(ValueError("")) == "ValueError"
    assert joined_lines(ValueError("a\n  b\tc")) == "a b c"
    assert joined_lines(OSError()) == "OSError"
