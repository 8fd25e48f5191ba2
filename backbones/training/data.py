"""The images that a recipe names."""

from __future__ import annotations

from backbones.data import splits
from backbones.data.splits import Splits
from backbones.training.recipe import Recipe

_KEYS = (
    *("train_split", "val_split", "data_dir", "class_map", "input_key", "target_key", "download"),
    *("num_classes", "num_samples", "val_num_samples", "batch_size", "seed"),
)


def open_splits(recipe: Recipe) -> Splits:
    """:func:`backbones.data.splits.open_splits` of a recipe."""
    return splits.open_splits(recipe.data, **{key: getattr(recipe, key) for key in _KEYS})
