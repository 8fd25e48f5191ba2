"""Keys of recipes: fields of a dataclass, each declared once with its type, range and meaning."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from backbones.common.errors import RecipeError
from backbones.common.messages import joined_lines, shown

# -- declarations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The allowed range of a number, of the numbers in a list, or of a mapping's values."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf  # exclusive bounds, instead of low or high
    below: float = math.inf
    counts: Sequence[int] = ()  # allowed lengths of a list; empty for any
    rising: bool = False  # the numbers of a list must increase
    keys: Range | None = None  # of a mapping's keys

    def holds(self, value: Any) -> bool:
        """Whether ``value``, a number, a list of numbers or a mapping to numbers, is in range."""
        if isinstance(value, dict):
            keys = self.keys or Range()
            return all(map(keys.holds, value)) and all(map(self.holds, value.values()))
        if isinstance(value, tuple):
            if self.counts and len(value) not in self.counts:
                return False
            if self.rising and any(a >= b for a, b in zip(value, value[1:], strict=False)):
                return False
            return all(map(self.holds, value))
        # NaN fails the comparisons, an infinite value those with the finite ends of the table.
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        ends = (
            (self.low, "at least"),
            (self.above, "above"),
            (self.high, "at most"),
            (self.below, "below"),
        )
        text = " and ".join(f"{word} {end:.10g}" for end, word in ends if math.isfinite(end))
        if math.isfinite(self.low) and math.isfinite(self.high):
            text = f"within {self.low:.10g} … {self.high:.10g}"
        if self.keys is not None:
            text = f"{text} from an epoch on that is {self.keys}"
        if self.rising:
            text = f"{text}, each above the one before"
        if self.counts:
            count = " or ".join(map(str, self.counts))
            text = f"{count} number{'s' if self.counts != (1,) else ''} {text}"
        return text


def key(group: str, default: Any, help: str, allowed: Range | Sequence[Any] = ()) -> Any:
    """A field of a recipe, of a type's values those ``allowed``, if any.

    Keys of the group ``"run"`` don't affect results.
    """
    metadata = {"group": group, "help": help, "allowed": allowed}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def again(base: type, name: str, default: Any, help: str = "", allowed: Sequence[Any] = ()) -> Any:
    """A key of ``base`` with another default and, if given, another help or fewer values."""
    said = next(f.metadata for f in dataclasses.fields(base) if f.name == name)
    return key(said["group"], default, help or said["help"], allowed or said["allowed"])


def fields_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """The keys of a kind of recipe by name, group by group.

    Its class attribute ``groups``, if any, gives their order, and ``refused`` the inherited keys
    that it does not have.
    """
    refused, groups = getattr(kind, "refused", ()), getattr(kind, "groups", ())
    fields = [f for f in dataclasses.fields(kind) if f.name not in refused]
    if groups:
        fields.sort(key=lambda f: groups.index(f.metadata["group"]))
    return {f.name: f for f in fields}


def range_of(f: dataclasses.Field[Any]) -> Range | None:
    """The range of a key, if it has one."""
    allowed = f.metadata["allowed"]
    return allowed if isinstance(allowed, Range) else None


def check_ranges(recipe: Any) -> None:
    """Reject the first value that is out of its key's range; None is in any."""
    for name, f in fields_of(type(recipe)).items():
        span, value = range_of(f), getattr(recipe, name)
        if span is not None and value is not None and not span.holds(value):
            raise RecipeError(f"{name} must be {span}, not {shown(value)}")


# -- values ----------------------------------------------------------------------------------------

_Kind = TypeVar("_Kind")


def made_of(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """A recipe of plain values, as from YAML or a command line, in the range of their keys."""
    fields, hints = fields_of(kind), typing.get_type_hints(kind)
    recipe = kind(**{k: _as_type_of(fields[k], hints[k], v) for k, v in values.items()})
    check_ranges(recipe)
    return recipe


_SCALARS = (int, float, str, bool)
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MOST_VALUES, _DEEPEST = 10_000, 20
_ERRORS = (TypeError, ValueError, OverflowError)


def inner_type(hint: Any) -> Any:
    """``int`` of ``int | None``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _as_type_of(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint`` of a key. YAML 1.1 reads 1e-3 as a string; flags all are."""
    name, inner = f.name, inner_type(hint)
    if inner is not hint and (
        value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    ):
        converted: Any = None
    else:
        try:
            converted = _convert(inner, value)
        except _ERRORS:
            label = getattr(inner, "__name__", str(inner)) if inner in _SCALARS else str(inner)
            raise RecipeError(f"{name} must be {label}, not {shown(value)}") from None
    if isinstance(converted, str):
        _check_text(name, converted, may_be_empty=f.default == "")
    allowed = f.metadata["allowed"]
    if allowed and not isinstance(allowed, Range) and converted not in allowed:
        raise RecipeError(
            f"{name} must be one of {', '.join(map(str, allowed))}, not {shown(value)}"
        )
    return converted


def _check_text(name: str, text: str, may_be_empty: bool) -> None:
    if not text and not may_be_empty:
        raise RecipeError(f"{name} is empty: give a value, or omit it")
    # Control characters, and command-line bytes that are not UTF-8.
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise RecipeError(f"{name} must be printable text, not {shown(text)}")


def _convert(kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, (bool, int, str)) and str(value).lower() in _TRUTH:
            return _TRUTH[str(value).lower()]
        return _fail(value)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            _fail(value)
        return int(value)
    if kind is float:
        return _fail(value) if isinstance(value, bool) else float(value)
    if kind is str:
        return value if isinstance(value, str) else _fail(value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]  # a command line's single word, such as 1,2
        if isinstance(value, str):
            value = parse_yaml(value) if value.startswith("[") else value.split(",")
        if not isinstance(value, (list, tuple)):
            _fail(value)
        return tuple(_convert(typing.get_args(kind)[0], v) for v in value)
    if isinstance(value, str):
        value = parse_yaml(value)
    if not isinstance(value, dict):
        _fail(value)
    key_type, value_type = typing.get_args(kind)
    if value_type is Any:
        _check_plain(value)
        return {_convert(key_type, k): v for k, v in value.items()}
    return {_convert(key_type, k): _convert(value_type, v) for k, v in value.items()}


def _check_plain(value: Any) -> None:
    """Only plain values: numbers, text, lists, mappings."""
    pending, seen = [(value, 0)], 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            _fail(value)
        if isinstance(value, dict):
            pending += [(v, depth + 1) for pair in value.items() for v in pair]
        elif isinstance(value, list):
            pending += [(v, depth + 1) for v in value]
        elif value is not None and not isinstance(value, _SCALARS):
            _fail(value)


def _fail(value: Any) -> Any:
    raise ValueError(shown(value))


def nearest(kind: str, value: str, valid: Iterable[Any]) -> str:
    """An error message with the valid names closest to a wrong one."""
    names = [str(name) for name in valid]
    near = difflib.get_close_matches(value[:80], names, n=4, cutoff=0.5) or sorted(names)[:12]
    return f"unknown {kind} {shown(value)}" + (f"; did you mean {', '.join(near)}?" if near else "")


# -- YAML ------------------------------------------------------------------------------------------

_MOST_BYTES = 2**20
# Exceptions that PyYAML raises besides its own: RecursionError for deep nesting, the others for
# tags such as !!int without a value.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML would silently use the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Before merge keys (<<) are expanded, which may legitimately repeat a key.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"duplicate key {key.value!r}", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; a ValueError of one line if it is none, or has duplicate keys."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except _YAML_ERRORS as error:
        raise ValueError(joined_lines(error)) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from None
    if len(data) > _MOST_BYTES:
        raise RecipeError(f"{path} is not a recipe: it is larger than {_MOST_BYTES} bytes")
    try:
        content = parse_yaml(data.decode())
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a recipe: it is not UTF-8 text") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping of recipe keys, not {type(content).__name__}")
    return content


def dump(recipe: Any) -> str:
    """The recipe as YAML that can be read back: every key, grouped and explained."""
    lines: list[str] = []
    group = ""
    for name, f in fields_of(type(recipe)).items():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# --- {group}"] if lines else [f"# --- {group}"]
        value = getattr(recipe, name)
        value = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        entry = f"{name}: {text.removesuffix('...' + chr(10)).strip()}"
        lines.append(f"{entry:<32} # {f.metadata['help']}")
    return "\n".join(lines) + "\n"
