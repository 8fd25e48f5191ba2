"""Recipes: YAML, the table of variants, the command line, and what they refuse."""

from pathlib import Path

import pytest
import yaml

import train_cls
from backbones.training.command_line import parse_command_line
from backbones.training.errors import RecipeError
from backbones.training.recipe import FIELDS, Recipe, differences, dump_recipe, load_recipe

CONFIGS = sorted((Path(train_cls.__file__).parent / "configs" / "cls").glob("*.yaml"))


@pytest.fixture
def family(tmp_path):
    path = tmp_path / "van.yaml"
    path.write_text(
        "model: van_b0\nlr_base: 1e-3\nopt_betas: [0.9, 0.99]\n"
        "variants:\n  van_b0: {drop_path: 0.1}\n  van_b2: {drop_path: 0.2, batch_size: 64}\n"
    )
    return path


def test_every_key_is_explained():
    assert all(f.metadata["help"] and f.metadata["group"] for f in FIELDS.values())


def test_a_dumped_recipe_reads_back_as_it_was(tmp_path):
    recipe = Recipe(
        model="van_b0",
        mean=(0.1, 0.2, 0.3),
        img_size_schedule={0: 128, 30: 160},
        model_args={"depths": [1, 2]},
        lr=1e-5,
        aa="3a",
        opt_eps=1e-8,
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert list(yaml.safe_load(path.read_text())) == list(FIELDS)


def test_a_file_its_variants_and_overrides(family):
    recipe = load_recipe(family)
    assert (recipe.model, recipe.drop_path, recipe.lr_base) == ("van_b0", 0.1, 1e-3)
    assert recipe.opt_betas == (0.9, 0.99)
    recipe = load_recipe(family, {"model": "van_b2", "drop_path": 0.3})
    assert (recipe.drop_path, recipe.batch_size) == (0.3, 64)


def test_a_model_that_the_variants_lack(family):
    with pytest.raises(RecipeError, match=r"unknown model 'van_b5'; did you mean van_b[02], van_b"):
        load_recipe(family, {"model": "van_b5"})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_of_this_repository(config):
    variants = yaml.safe_load(config.read_text()).get("variants") or {None: {}}
    for model in variants:
        recipe = load_recipe(config, {} if model is None else {"model": model})
        assert recipe.model


def test_flags():
    words = "--model van_b0 --ema --no-pin-memory --scale 0.5 1 --mean 0.5,0.4,0.3 --lr=1e-3"
    words += " --drop none --batch_size 32 --sync-bn true --decay-milestones 3 5"
    recipe, options = parse_command_line([*words.split(), "--img-size-schedule", "{0: 64}"])
    assert recipe.ema and recipe.sync_bn and not recipe.pin_memory
    assert (recipe.scale, recipe.mean) == ((0.5, 1.0), (0.5, 0.4, 0.3))
    assert (recipe.lr, recipe.drop, recipe.batch_size) == (1e-3, None, 32)
    assert recipe.decay_milestones == (3, 5)
    assert recipe.img_size_schedule == {0: 64}
    assert options.config is None and not options.print_config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batchsize 3", "unknown option '--batchsize'; did you mean --batch-size"),
        ("--no-emma", "unknown option '--no-emma'; did you mean --no-ema"),
        ("three", "unexpected 'three'"),
        ("--batch-size many", "batch_size must be int, not 'many'"),
        ("--batch-size 0", "batch_size must be at least 1, not 0"),
        ("--epochs 2.5", "epochs must be int, not '2.5'"),
        ("--amp fp8", "amp must be one of None, bf16, fp16, not 'fp8'"),
        ("--ema maybe", "ema must be bool, not 'maybe'"),
        ("--threads 0", "threads must be at least 1, not 0"),
        ("--hflip 2", "hflip must be within 0 and 1"),
        ("--mean 1 2", "mean must be 3 numbers"),
        ("--scale 0.1", "scale must be two numbers"),
        ("--model-args 3", "model_args must be"),
        ("--mixup 0.2 --batch-size 7", "need an even batch_size, not 7"),
        ("--pretrained --checkpoint x.pt", "exclude each other"),
        ("--config nowhere.yaml", "cannot read the recipe nowhere.yaml"),
    ],
)
def test_what_a_command_line_cannot_say(words, message):
    with pytest.raises(RecipeError, match=message):
        parse_command_line(words.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown key 'batchsize'; did you mean batch_size"),
        ("variants: {van_b0: {dropp: 1}}\nmodel: van_b0", "variant van_b0: unknown key 'dropp'"),
        ("variants: [van_b0]", "variants must map"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_a_file_cannot_say(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_print_config(family, capsys):
    assert train_cls.main(["--config", str(family), "--model", "van_b2", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"], printed["drop_path"]) == ("van_b2", 0.2)


def test_errors_come_without_a_traceback(capsys):
    assert train_cls.main(["--modle", "van_b0"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: unknown option '--modle'; did you mean --model"
    )


def test_differences_name_what_changes_a_result():
    earlier = vars(Recipe(lr=1e-3, name="a"))
    assert differences(Recipe(lr=2e-3, name="b"), earlier) == ["lr: 0.001 → 0.002"]
