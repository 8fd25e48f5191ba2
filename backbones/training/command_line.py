"""From YAML and a command line to a recipe: every key is a flag."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones.common.console import Parser
from backbones.common.errors import RecipeError
from backbones.common.keys import (
    fields_of,
    inner_type,
    made_of,
    nearest,
    range_of,
    read_mapping,
)
from backbones.common.messages import shown
from backbones.training.recipe import AnyRecipe, Recipe, check


def load_recipe(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    recipe_class: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> AnyRecipe:
    """Read a recipe: defaults, then the file, then its row for the model, then ``overrides``.

    Args:
        path: a YAML file of keys. Its ``variants``, if present, maps model names to keys that
            differ, and must include the model.
        overrides: keys that take precedence; values as in YAML, or strings from a command line.
    """
    fields = fields_of(recipe_class)
    overrides = dict(overrides or {})
    keys = read_mapping(Path(path)) if path is not None else {}
    variants = keys.pop("variants", None)
    where = str(path)
    _refuse_unknown(keys, where, fields)
    if variants is not None:
        model = overrides.get("model", keys.get("model", ""))
        keys = {**keys, "model": model, **_row(variants, model, where, fields)}
    _refuse_unknown(overrides, "command line", fields)
    recipe = made_of(recipe_class, {**keys, **overrides})
    check(recipe)
    return recipe


def parse_command_line(
    argv: Sequence[str] | None = None,
    description: str = "",
    recipe_class: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> tuple[AnyRecipe, argparse.Namespace]:
    """The recipe given by a command line, and the options that are not recipe keys.

    Every key is a flag: ``batch_size`` is ``--batch-size`` (or ``--batch_size``), a true/false key
    is ``--ema`` or ``--no-ema``, ``null`` is ``none``, a list takes several words, and a mapping
    is quoted YAML. Additional options are ``--config FILE`` and ``--print-config``.
    """
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML recipe, such as configs/cls/*.yaml")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe and exit"
    )
    parser.argument_default = argparse.SUPPRESS  # of the keys
    groups: dict[str, Any] = {}
    fields, hints = fields_of(recipe_class), typing.get_type_hints(recipe_class)
    for f in fields.values():
        name = f.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        _add_flag(group, f, inner_type(hints[f.name]))
    options, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            flags = [flag for a in parser._actions for flag in a.option_strings if "_" not in flag]
            raise RecipeError(nearest("option", word.split("=")[0], flags))
        raise RecipeError(f"unexpected {shown(word)} on the command line")
    given = {k: v for k, v in vars(options).items() if k in fields}
    return load_recipe(options.config, given, recipe_class), options


def _add_flag(group: Any, f: dataclasses.Field[Any], inner: Any) -> None:
    flags = [f"--{f.name.replace('_', '-')}"]
    if "_" in f.name:
        flags.append(f"--{f.name}")
    default = "…" if f.default is dataclasses.MISSING else f.default
    limits = f"; {span}" if (span := range_of(f)) is not None else ""
    text = f"{f.metadata['help']}{limits} (default: {default})".replace("%", "%%")
    if inner is bool:
        group.add_argument(*flags, nargs="?", const=True, help=text, metavar="true|false")
        if f.name != "no_aug":
            negated = [flag.replace("--", "--no-", 1) for flag in flags]
            hidden = argparse.SUPPRESS
            group.add_argument(*negated, dest=f.name, action="store_false", help=hidden)
        return
    nargs = "+" if typing.get_origin(inner) is tuple else None
    metavar = "X" if nargs else f.name.upper()
    group.add_argument(*flags, nargs=nargs, metavar=metavar, help=text)


def _row(variants: Any, model: Any, where: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a model in the table of variants."""
    if not isinstance(variants, dict):
        raise RecipeError(f"{where}: variants must map model names to keys")
    model = model if isinstance(model, str) else shown(model)
    if model not in variants:
        raise RecipeError(f"{where}: {nearest('model', model, variants)}")
    row = variants[model] or {}
    if not isinstance(row, dict):
        raise RecipeError(f"{where}, variant {model}: must be a mapping of keys, not {shown(row)}")
    _refuse_unknown(row, f"{where}, variant {model}", fields)
    return row


def _refuse_unknown(keys: Mapping[str, Any], where: str, fields: Mapping[str, Any]) -> None:
    for key in keys:
        if key not in fields:
            raise RecipeError(f"{where}: {nearest('key', str(key), fields)}")
