"""Parsing of YAML in recipes and flags: plain values only, without duplicate keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from backbones.common.errors import RecipeError
from backbones.core.messages import joined_lines

__all__ = ["parse_yaml", "read_mapping"]

_MOST_BYTES = 2**20
# Exceptions that PyYAML raises besides its own: RecursionError for deep nesting, the others for
# tags such as !!int without a value.
_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


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
    """The value of a YAML text.

    Raises:
        ValueError: not YAML, or a duplicate key; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except _ERRORS as error:
        raise ValueError(joined_lines(error)) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: missing, or not a YAML mapping in UTF-8.
    """
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
