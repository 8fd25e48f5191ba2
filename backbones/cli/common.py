"""Shared by the commands: creating models and loading a user's weights."""

from __future__ import annotations

import json
import logging
import math
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.data import ImageNetInfo

import backbones
from backbones.common.errors import CREATION_ERRORS, CommandError, memory_shortage
from backbones.common.memory import available_memory, peak_bytes
from backbones.core.base import StagedBackbone
from backbones.core.checkpoint import load_tensors, read_checkpoint, strip_prefixes
from backbones.core.inputs import channels_of, require_size, size_of
from backbones.core.messages import first_line, one_line, shown
from backbones.restoration.recipe import RestorationRecipe
from backbones.training.recipe import Recipe, load_recipe
from backbones.training.recipe_yaml import parse_yaml, read_mapping

__all__ = [
    "Loaded",
    "add_size_argument",
    "create",
    "fuse",
    "load",
    "quiet",
    "read_labels",
    "read_text",
    "two_sides",
]


@dataclass
class Loaded:
    """A model in eval mode, with information found next to its checkpoint.

    Attributes:
        name: of the architecture.
        recipe: the training recipe saved next to the checkpoint by ``train_cls.py``, or None.
        report: the :class:`backbones.LoadReport` of loading; None without a checkpoint.
        classes: class names by index; empty if unknown.
    """

    model: Any
    name: str
    recipe: Recipe | None = None
    classes: list[str] = field(default_factory=list)
    report: Any = None


def add_size_argument(parser: ArgumentParser, help: str) -> None:
    """``--size S`` or ``--size H W``; see :func:`two_sides`."""
    parser.add_argument("--size", type=int, nargs="+", metavar="PX", help=help)


def two_sides(
    size: Sequence[int] | None, model: Any, batch: int = 1, runs: bool = True
) -> tuple[int, int]:
    """Height and width: as given by the user, or else the model's default input size.

    Args:
        model: unfused.
        batch: number of images.
        runs: whether the model will run, so that memory must suffice.

    Raises:
        CommandError: not one or two numbers in 1 … 65535, images too large for memory, or of a
            size that the model does not take.
    """
    if size is None:
        return size_of(model)
    if len(size) > 2 or min(size) < 1 or max(size) > _LONGEST_SIDE:
        raise CommandError(
            f"--size takes one side, or height and width, of 1 to {_LONGEST_SIDE} pixels, got "
            f"{shown(list(size))}"
        )
    sides = size[0], size[-1]
    if runs and math.prod(sides) * batch > _SMALL:
        need = peak_bytes(model, (batch, channels_of(model), *sides))
        free = available_memory(torch.device("cpu"), unknown=sys.maxsize)
        if need > free:
            images = f"{batch} images" if batch > 1 else "an image"
            raise CommandError(
                f"--size {sides[0]} {sides[1]}: {images} of that size would take "
                f"{need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            )
    try:
        require_size(model, sides)
    except ValueError as error:
        raise CommandError(f"--size {sides[0]} {sides[1]}: {error}") from error
    return sides


# JPEG stores sides in 16 bits.
_LONGEST_SIDE = 65535
# Up to this number of pixels, memory is not checked.
_SMALL = 512 * 512


def create(name: str, **kwargs: Any) -> Any:
    """A model in eval mode.

    Raises:
        CommandError: no such model, or invalid arguments for it.
    """
    try:
        return backbones.create_model(name, **kwargs).eval()
    except backbones.CheckpointError:
        raise
    except ValueError as error:
        raise CommandError(str(error)) from error
    except CREATION_ERRORS as error:
        # Without arguments, it is a bug.
        if not kwargs or memory_shortage(error) is not None:
            raise
        raise CommandError(f"cannot create {name} with {shown(kwargs)}: {error}") from error


def fuse(model: Any, **options: Any) -> None:
    """:func:`backbones.fuse`.

    Raises:
        CommandError: the model cannot be fused so.
    """
    try:
        backbones.fuse(model, **options)
    except ValueError as error:
        raise CommandError(str(error)) from error


def load(name: str | None, checkpoint: Path | None, pretrained: bool = False) -> Loaded:
    """The model ``name``, or the one that the checkpoint names, with the weights of ``checkpoint``.

    Without a checkpoint its weights are random, or with ``pretrained`` the published ones.

    A checkpoint of ``train_cls.py`` comes with a recipe (``config.yaml`` next to it) and class
    names, and so does a file of ``export --int8`` made from one; for any other, only the number of
    classes is known.

    Raises:
        CommandError: no model name, or an unknown one; or a checkpoint and ``pretrained``.
        ConnectionError: the published weights cannot be downloaded.
        FileNotFoundError, backbones.CheckpointError: see :func:`backbones.load_checkpoint`.
    """
    if checkpoint is None:
        if name is None:
            raise CommandError("give --model NAME, or a --checkpoint of train_cls.py")
        model = create(name, pretrained=True) if pretrained else create(name)
        return Loaded(model, name, classes=_imagenet_names(model))
    if pretrained:
        raise CommandError("--pretrained and --checkpoint both name weights: give one of them")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    metadata = _metadata(checkpoint)
    recipe = _recipe_in(metadata, checkpoint) or _recipe_beside(checkpoint)
    if name is None:
        name = metadata.get("model") or (recipe.model if recipe else None)
    if name is None:
        raise CommandError(f"{checkpoint} does not name its model; give --model NAME")
    if recipe is not None and recipe.model.partition(".")[0] != name.partition(".")[0]:
        recipe = None
    arguments: dict[str, Any] = {}
    if recipe is not None:
        arguments = {"in_chans": recipe.in_chans, **recipe.model_args}
        if isinstance(recipe, RestorationRecipe):
            recipe = None  # of no use for preprocessing
        else:
            arguments["global_pool"] = recipe.global_pool
    model = create(name, **arguments)
    tensors = read_checkpoint(checkpoint)
    with quiet():
        count = class_count(model, tensors)
        if count is not None and count != model.num_classes:
            model.reset_classifier(count)
        report = load_tensors(model.eval(), tensors, str(checkpoint))
    classes = _classes_in(metadata, checkpoint)
    if len(classes) != model.num_classes:
        classes = [] if recipe is not None else _imagenet_names(model)
    return Loaded(model, name, recipe, classes, report)


def class_count(model: Any, tensors: dict[str, Any]) -> int | None:
    """The number of classes of the classifier in ``tensors``; None if it has no classifier."""
    stripped, _ = strip_prefixes(tensors)
    if isinstance(model, StagedBackbone):
        paths, converted = model.classifier, model.convert_state_dict(stripped)
    else:
        paths, converted = model.pretrained_cfg.get("classifier") or (), stripped
    if not paths:
        return None
    path = paths if isinstance(paths, str) else paths[0]
    for name in (f"{path}.weight", f"{path}.linear.weight"):
        if name in converted:
            return len(converted[name])
    return None


def read_labels(path: Path, count: int) -> list[str]:
    """Class names from a text file with one per line, or JSON (a list, or a dict by index).

    Raises:
        CommandError: the file cannot be read, is neither, or doesn't have ``count`` names.
    """
    text = read_text(path, "--labels")
    if path.suffix == ".json":
        try:
            content = json.loads(text)
            if isinstance(content, dict):
                content = [content[str(number)] for number in range(len(content))]
            if not isinstance(content, list):
                raise TypeError(content)
            # ImageNet's are published as [WordNet ID, name]: take the name.
            names = [one_line(str(n[-1] if isinstance(n, list) else n)) for n in content]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise CommandError(
                f"{path} is not a JSON list of names or a JSON dict of names by index"
            ) from error
    else:
        names = [one_line(line.strip()) for line in text.splitlines() if line.strip()]
    if len(names) != count:
        raise CommandError(f"{path} names {len(names)} classes, but the model has {count}")
    return names


def read_text(path: Path, option: str) -> str:
    """The text of a file that an option names.

    Raises:
        CommandError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{option} {path} is not UTF-8 text") from error
    except OSError as error:
        raise CommandError(f"cannot read {option} {path}: {error.strerror}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of checkpoint loading; the commands report problems themselves."""
    log = logging.getLogger("backbones.core.checkpoint")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _metadata(checkpoint: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    if checkpoint.suffix != ".safetensors":
        return {}
    try:
        with safe_open(checkpoint, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise backbones.CheckpointError(
            f"{checkpoint} is not a complete safetensors file: {error}"
        ) from error


def _classes_in(metadata: dict[str, str], checkpoint: Path) -> list[str]:
    """The class names stored in the file, if any."""
    try:
        names = json.loads(metadata.get("classes", "[]"))
        if not isinstance(names, list):
            raise TypeError(names)
    except (ValueError, TypeError, RecursionError) as error:
        raise backbones.CheckpointError(
            f"{checkpoint}: its metadata has no list of names under 'classes'"
        ) from error
    return [one_line(str(name)) for name in names]


def _recipe_in(metadata: dict[str, str], checkpoint: Path) -> Recipe | None:
    """The recipe stored in the file, if any."""
    if "recipe" not in metadata:
        return None
    try:
        return load_recipe(overrides=parse_yaml(metadata["recipe"]))
    except (ValueError, TypeError) as error:
        raise backbones.CheckpointError(
            f"{checkpoint}: its metadata has no recipe under 'recipe': {first_line(error)}"
        ) from error


def _recipe_beside(checkpoint: Path) -> Recipe | None:
    path = checkpoint.with_name("config.yaml")
    if not path.is_file():
        return None
    restores = "task" in read_mapping(path)
    return load_recipe(path, {}, RestorationRecipe if restores else Recipe)


def _imagenet_names(model: Any) -> list[str]:
    """timm's class names for a model with ImageNet's 1000 classes."""
    if model.num_classes != 1000:
        return []
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(number).partition(",")[0] for number in range(1000)]
