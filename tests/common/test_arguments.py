"""Argument types of the command line, and their error messages."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from backbones.common import arguments
from backbones.common.errors import CommandError


@pytest.mark.parametrize("word", ["", "a\0b"])
def test_names_of_files(word):
    with pytest.raises(argparse.ArgumentTypeError, match="must be the name of a file or folder"):
        arguments.nonempty_path(word)
    assert arguments.nonempty_path("a b") == Path("a b")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("0", "must be within 1 … 8, not 0"),
        ("-1", "must be within 1 … 8, not -1"),
        ("9", "must be within 1 … 8, not 9"),
        ("2.5", "must be a whole number, not '2.5'"),
        ("", "must be a whole number, not ''"),
        ("nan", "must be a whole number, not 'nan'"),
        ("9" * 1000, "must be within 1 … 8, not 999"),
        ("9" * 5000, "must be a whole number, not '999"),
    ],
)
def test_whole_numbers(word, said):
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        arguments.whole(1, 8)(word)
    assert str(raised.value).startswith(said)
    assert len(str(raised.value)) < 120
    assert arguments.whole(1, 8)("8") == 8
    assert arguments.whole(0)("10000000000") == 10**10


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("0", "must be above 0 and at most 1, not 0"),
        ("-1", "must be above 0 and at most 1, not -1"),
        ("1.1", "must be above 0 and at most 1, not 1.1"),
        *((word, f"must be a number, not '{word}'") for word in ("nan", "inf", "-inf", "x", "")),
    ],
)
def test_numbers(word, said):
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        arguments.real(0, 1, above=True)(word)
    assert str(raised.value).startswith(said)
    assert arguments.real(0, 1, above=True)("1e-3") == 1e-3
    assert arguments.real(0)("0") == 0


@pytest.mark.parametrize("name", ["", "meta", "cuda:99", "mkldnn", "xla", "cpu:-1", "pine\napple"])
def test_unusable_devices(name):
    with pytest.raises(CommandError, match="cannot be used here: ") as raised:
        arguments.usable_device(name)
    assert len(str(raised.value)) < 300
    assert arguments.usable_device("cpu").type == "cpu"
