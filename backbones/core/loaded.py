"""A network with a user's weights, and what its training recipe states."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.data import ImageNetInfo
from torch import nn

from backbones.common.checkpoint_files import CheckpointError
from backbones.common.console import silence
from backbones.common.errors import CREATION_ERRORS, CommandError, RecipeError, memory_shortage
from backbones.common.keys import Range, fields_of, key, made_of, parse_yaml, read_mapping
from backbones.common.messages import first_line, one_line, shown
from backbones.core import registry
from backbones.core.base import StagedBackbone
from backbones.core.checkpoint import load_tensors, read_checkpoint, strip_prefixes
from backbones.core.inputs import preprocessing_of, size_of


@dataclass
class NetworkKeys:
    """The keys of a recipe that say which network is trained, and with which preprocessing.

    For the latter, None takes the network's own.
    """

    model: str = key("model", "", "name of the model, see backbones.list_models()")
    in_chans: int = key("model", 3, "channels of the input; 1: greyscale", (1, 3))
    global_pool: str | None = key("model", None, "pooling of the head; None: as published")
    model_args: dict[str, Any] = key("model", {}, "further keywords of backbones.create_model")
    img_size: int | None = key(
        "preprocessing", None, "side of the square input, in pixels", Range(low=1, high=2**14)
    )
    crop_pct: float | None = key(
        "preprocessing", None, "fraction of the image that validation crops", Range(low=0.1, high=1)
    )
    crop_mode: str | None = key(
        "preprocessing", None, "crop mode in validation", (None, "center", "squash", "border")
    )
    interpolation: str | None = key(
        *("preprocessing", None, "interpolation in validation"),
        (None, "bilinear", "bicubic", "nearest"),
    )
    mean: tuple[float, ...] | None = key(
        "preprocessing", None, "per channel, of pixels in 0..1", Range(low=0, high=1)
    )
    std: tuple[float, ...] | None = key(
        "preprocessing", None, "per channel, of pixels in 0..1", Range(low=1e-3, high=10)
    )


@dataclass
class Loaded:
    """A model in eval mode, with information found next to its checkpoint."""

    model: Any
    name: str  # of the architecture
    recipe: NetworkKeys | None = None
    classes: list[str] = field(default_factory=list)  # names by index; empty if unknown
    report: Any = None  # the LoadReport, with a checkpoint


def create(name: str, **kwargs: Any) -> Any:
    """A model in eval mode; a CommandError says what is wrong with its name or arguments."""
    try:
        return registry.create_model(name, **kwargs).eval()
    except CheckpointError:
        raise
    except ValueError as error:
        raise CommandError(str(error)) from error
    except CREATION_ERRORS as error:
        # Without arguments, it is a bug.
        if not kwargs or memory_shortage(error) is not None:
            raise
        raise CommandError(f"cannot create {name} with {shown(kwargs)}: {error}") from error


def fuse(model: Any, **options: Any) -> None:
    """:func:`backbones.fuse`, with a CommandError if the model cannot be fused so."""
    try:
        registry.fuse(model, **options)
    except ValueError as error:
        raise CommandError(str(error)) from error


def load(name: str | None, checkpoint: Path | None, pretrained: bool = False) -> Loaded:
    """The model ``name``, or the one that the checkpoint names, with the weights of ``checkpoint``.

    Without a checkpoint its weights are random, or with ``pretrained`` the published ones.

    A checkpoint of ``train_cls.py`` comes with a recipe (``config.yaml`` next to it) and class
    names, and so does a file of ``export --int8`` made from one; for any other, only the number of
    classes is known.
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
    recipe, restores = _recipe_of(metadata, checkpoint)
    if name is None:
        name = metadata.get("model") or (recipe.model if recipe else None)
    if name is None:
        raise CommandError(f"{checkpoint} does not name its model; give --model NAME")
    if recipe is not None and recipe.model.partition(".")[0] != name.partition(".")[0]:
        recipe = None
    arguments: dict[str, Any] = {}
    if recipe is not None:
        arguments = {"in_chans": recipe.in_chans, **recipe.model_args}
        if restores:
            recipe = None  # of no use for preprocessing
        else:
            arguments["global_pool"] = recipe.global_pool
    model = create(name, **arguments)
    tensors = read_checkpoint(checkpoint)
    with silence():  # the commands report problems themselves
        count = class_count(model, tensors)
        if count is not None and count != model.num_classes:
            model.reset_classifier(count)
        report = load_tensors(model.eval(), tensors, str(checkpoint))
    classes = _classes_in(metadata, checkpoint)
    if len(classes) != model.num_classes:
        classes = [] if recipe is not None else _imagenet_names(model)
    return Loaded(model, name, recipe, classes, report)


def preprocessing(loaded: Loaded) -> dict[str, Any]:
    """:func:`preprocessing_of`, by the training recipe if there is one."""
    if loaded.recipe is not None:
        return preprocessing_by(loaded.recipe, loaded.model)
    return preprocessing_of(loaded.model)


def preprocessing_by(recipe: NetworkKeys, model: nn.Module) -> dict[str, Any]:
    """:func:`preprocessing` from a recipe or, if unset, the model's ``pretrained_cfg``."""
    size = recipe.img_size or size_of(model)[-1]
    return preprocessing_of(
        model,
        input_size=(recipe.in_chans, size, size),
        mean=recipe.mean,
        std=recipe.std,
        interpolation=recipe.interpolation,
        crop_pct=recipe.crop_pct,
        crop_mode=recipe.crop_mode,
    )


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


def _metadata(checkpoint: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    if checkpoint.suffix != ".safetensors":
        return {}
    try:
        with safe_open(checkpoint, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{checkpoint} is not a complete safetensors file: {error}"
        ) from error


def _classes_in(metadata: dict[str, str], checkpoint: Path) -> list[str]:
    """The class names stored in the file, if any."""
    try:
        names = json.loads(metadata.get("classes", "[]"))
        if not isinstance(names, list):
            raise TypeError(names)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint}: its metadata has no list of names under 'classes'"
        ) from error
    return [one_line(str(name)) for name in names]


def _recipe_of(metadata: dict[str, str], checkpoint: Path) -> tuple[NetworkKeys | None, bool]:
    """The recipe in the file, or else next to it, and whether it restores images."""
    try:
        if "recipe" in metadata:
            return _network_keys(parse_yaml(metadata["recipe"])), False
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: its metadata has no recipe under 'recipe': {first_line(error)}"
        ) from error
    path = checkpoint.with_name("config.yaml")
    if not path.is_file():
        return None, False
    beside = read_mapping(path)
    try:
        return _network_keys(beside), "task" in beside
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _network_keys(recipe: Any) -> NetworkKeys:
    if not isinstance(recipe, dict) or "model" not in recipe:
        raise RecipeError("it is not a recipe, because it names no model")
    return made_of(NetworkKeys, {k: recipe[k] for k in fields_of(NetworkKeys) if k in recipe})


def _imagenet_names(model: Any) -> list[str]:
    """timm's class names for a model with ImageNet's 1000 classes."""
    if model.num_classes != 1000:
        return []
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(number).partition(",")[0] for number in range(1000)]
