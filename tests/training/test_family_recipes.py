"""Every family of classifiers has its published recipe, with a row for each variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from zoo import CLASSIFIERS

import backbones
from backbones.training.command_line import load_recipe

# Trained on videos, which are no data of train_cls.py.
VIDEO = {"unireplknet_b_k400"}
FOLDER = Path(__file__).parents[2] / "configs" / "cls"


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_recipe_names_every_variant(family: str) -> None:
    path = FOLDER / f"{family}.yaml"
    variants = list(yaml.safe_load(path.read_text())["variants"])
    # A row may be of certain weights, as in name.tag.
    names = {variant.split(".")[0] for variant in variants}
    assert sorted(names) == sorted({*backbones.list_models(family=family)} - VIDEO)
    for variant in variants:
        recipe = load_recipe(path, {"model": variant, "data": "x"})
        assert recipe.model == variant
        assert recipe.epochs > 0 and recipe.opt
