"""The command line of a training script: every recipe key is a flag."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from backbones.common.errors import RecipeError
from backbones.core.messages import shown
from backbones.training.recipe import AnyRecipe, Recipe, fields_of, load_recipe
from backbones.training.recipe_ranges import Range
from backbones.training.recipe_values import inner_type, nearest

__all__ = ["parse_command_line"]


def parse_command_line(
    argv: Sequence[str] | None = None,
    description: str = "",
    recipe_class: type[AnyRecipe] = Recipe,  # type: ignore[assignment]
) -> tuple[AnyRecipe, argparse.Namespace]:
    """The recipe given by a command line, and the options that are not recipe keys.

    Every key is a flag: ``batch_size`` is ``--batch-size`` (or ``--batch_size``), a true/false key
    is ``--ema`` or ``--no-ema``, ``null`` is ``none``, a list takes several words, and a mapping
    is quoted YAML. Additional options are ``--config FILE`` and ``--print-config``.

    Raises:
        RecipeError: as in :func:`load_recipe`; unknown options, or missing values.
    """
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML recipe, such as configs/cls/*.yaml")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe and exit"
    )
    groups: dict[str, Any] = {}
    fields, hints = fields_of(recipe_class), typing.get_type_hints(recipe_class)
    for f in fields.values():
        name = f.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        _add_flag(group, f, inner_type(hints[f.name]), recipe_class.ranges.get(f.name))
    options, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            flags = [flag for a in parser._actions for flag in a.option_strings if "_" not in flag]
            raise RecipeError(nearest("option", word.split("=")[0], flags))
        raise RecipeError(f"unexpected {shown(word)} on the command line")
    given = {k: v for k, v in vars(options).items() if k in fields}
    return load_recipe(options.config, given, recipe_class), options


class _Parser(argparse.ArgumentParser):
    """Raises RecipeErrors instead of printing a hundred lines of usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def _add_flag(group: Any, f: dataclasses.Field[Any], inner: Any, span: Range | None) -> None:
    flags = [f"--{f.name.replace('_', '-')}"]
    if "_" in f.name:
        flags.append(f"--{f.name}")
    default = "…" if f.default is dataclasses.MISSING else f.default
    limits = f"; {span}" if span is not None else ""
    text = f"{f.metadata['help']}{limits} (default: {default})".replace("%", "%%")
    if inner is bool:
        group.add_argument(
            *flags,
            nargs="?",
            const=True,
            default=argparse.SUPPRESS,
            help=text,
            metavar="true|false",
        )
        negated = [flag.replace("--", "--no-", 1) for flag in flags if f.name != "no_aug"]
        if negated:
            group.add_argument(
                *negated,
                dest=f.name,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        return
    nargs = "+" if typing.get_origin(inner) is tuple else None
    metavar = "X" if nargs else f.name.upper()
    group.add_argument(*flags, nargs=nargs, default=argparse.SUPPRESS, metavar=metavar, help=text)
