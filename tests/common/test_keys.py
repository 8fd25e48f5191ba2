"""Keys that are declared once: their order, what they inherit, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml

from backbones.common.errors import RecipeError
from backbones.common.keys import Range, again, dump, fields_of, key, made_of, range_of


@dataclass
class Base:
    size: int | None = key("image", None, "side in pixels", Range(low=8, high=64))
    rate: float = key("speed", 0.5, "how fast", Range(above=0, below=1))
    kind: str = key("image", "grey", "colours", ("grey", "rgb"))


@dataclass
class Derived(Base):
    groups: ClassVar[tuple[str, ...]] = ("speed", "image", "run")
    refused: ClassVar[frozenset[str]] = frozenset({"kind"})

    name: str | None = key("run", None, "of the folder")
    rate: float = again(Base, "rate", 0.25)
    steps: int = key("speed", 1, "at a time", Range(low=1, high=4))


def test_keys_are_listed_by_group():
    assert list(fields_of(Base)) == ["size", "rate", "kind"]
    assert list(fields_of(Derived)) == ["rate", "steps", "size", "name"]
    written = dump(Derived())
    assert written.startswith("# --- speed\nrate: 0.25 ")
    assert made_of(Derived, yaml.safe_load(written)) == Derived()


def test_a_key_declared_again_keeps_what_is_not_said():
    rate = fields_of(Derived)["rate"]
    assert (rate.default, rate.metadata["help"]) == (0.25, "how fast")
    assert str(range_of(rate)) == "above 0 and below 1"
    with pytest.raises(RecipeError, match="^rate must be above 0 and below 1, not 1.0$"):
        made_of(Derived, {"rate": 1})


def test_values_are_converted_and_refused():
    assert made_of(Base, {"size": "32", "rate": "1e-1", "kind": "rgb"}) == Base(32, 0.1, "rgb")
    assert made_of(Base, {"size": None}).size is None
    for values, said in (
        ({"size": 7}, r"^size must be within 8 … 64, not 7$"),
        ({"size": "many"}, r"^size must be int, not 'many'$"),
        ({"kind": "cmyk"}, r"^kind must be one of grey, rgb, not 'cmyk'$"),
    ):
        with pytest.raises(RecipeError, match=said):
            made_of(Base, values)
