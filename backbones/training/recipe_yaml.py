"""YAML of recipes and flags: plain values only, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from backbones.core.messages import joined_lines
from backbones.training.errors import RecipeError

__all__ = ["parse_yaml", "read_mapping"]

_MOST_BYTES = 2**20
# What PyYAML raises of text that only looks like a value, beside its own errors: RecursionError
# of deep nesting, the others of tags such as !!int with nothing behind them.
_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Before references are filled in, which may stand beside a key that they hold too.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} stands there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is no YAML, or has a key twice; the message is one line.
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
        RecipeError: missing, no text, no YAML, or no mapping.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from None
    if len(data) > _MOST_BYTES:
        raise RecipeError(f"{path} is no recipe: it is larger than {_MOST_BYTES} bytes")
    try:
        content = parse_yaml(data.decode())
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is no recipe: it holds no UTF-8 text") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping of recipe keys, not {type(content).__name__}")
    return content
