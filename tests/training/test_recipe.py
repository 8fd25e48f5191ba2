"""Recipes: YAML, the table of variants, the command line, and invalid values."""

from pathlib import Path

import pytest
import yaml
from PIL import Image
from zoo import CLASSIFIERS

import backbones
import train_cls
from backbones.common.errors import RecipeError
from backbones.common.keys import dump
from backbones.training.command_line import load_recipe, parse_command_line
from backbones.training.recipe import FIELDS, Recipe, differences

# Nine references to nine each, ten deep: a short text for a huge value.
BOMB = "lr_factors: {a0: &a0 [1, 2]}\nopt_args:\n" + "".join(
    f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
)
BOMB = BOMB.replace("lr_factors", "teacher_args").replace("opt_args", "mean")
CONFIGS = sorted((Path(train_cls.__file__).parent / "configs" / "cls").glob("*.yaml"))


@pytest.fixture
def family(tmp_path):
    path = tmp_path / "van.yaml"
    path.write_text(
        "model: van_b0\nlr_base: 1e-3\nopt_betas: [0.9, 0.99]\n"
        "variants:\n  van_b0: {drop_path: 0.1}\n  van_b2: {drop_path: 0.2, batch_size: 64}\n"
    )
    return path


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
    path.write_text(dump(recipe))
    assert load_recipe(path) == recipe
    assert list(yaml.safe_load(path.read_text())) == list(FIELDS)


def test_a_file_its_variants_and_overrides(family):
    recipe = load_recipe(family)
    assert (recipe.model, recipe.drop_path, recipe.lr_base) == ("van_b0", 0.1, 1e-3)
    assert recipe.opt_betas == (0.9, 0.99)
    recipe = load_recipe(family, {"model": "van_b2", "drop_path": 0.3})
    assert (recipe.drop_path, recipe.batch_size) == (0.3, 64)


def test_a_model_missing_from_the_variants(family):
    with pytest.raises(RecipeError, match=r"unknown model 'van_b5'; did you mean van_b[02], van_b"):
        load_recipe(family, {"model": "van_b5"})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_of_this_repository(config):
    """Each can be read for each of its variants; a family's names all that train on images."""
    keys = yaml.safe_load(config.read_text())
    variants = keys.get("variants") or [keys.get("model", "van_b0")]  # that of digits has neither
    for model in variants:
        recipe = load_recipe(config, {"model": model})
        assert recipe.model and recipe.epochs > 0 and recipe.opt
    if config.stem in CLASSIFIERS:
        # A row may be of certain weights, as in name.tag.
        names = {variant.split(".")[0] for variant in variants}
        assert names == {*backbones.list_models(family=config.stem)} - {"unireplknet_b_k400"}


def test_every_family_of_classifiers_has_a_recipe():
    assert set(CLASSIFIERS) <= {config.stem for config in CONFIGS}


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
        ("--batch-size 0", "batch_size must be within 1 … 1000000, not 0"),
        ("--epochs 2.5", "epochs must be int, not '2.5'"),
        ("--amp fp8", "amp must be one of None, bf16, fp16, not 'fp8'"),
        ("--ema maybe", "ema must be bool, not 'maybe'"),
        ("--mean 0 1", "mean must be 3 numbers"),
        ("--scale 0.1", "scale must be 2 numbers above 0 and at most 1, each above"),
        ("--model-args 3", "model_args must be"),
        ("--mixup 0.2 --batch-size 7", "need an even batch_size, not 7"),
        ("--pretrained --checkpoint x.pt", "mutually exclusive"),
        ("--config nowhere.yaml", "cannot read the recipe nowhere.yaml"),
        ("--checkpoint=", "checkpoint is empty: give a value, or omit it"),
        ("--name=a\nb", "name must be printable text"),
        # Every number has its range, and only numbers are in it.
        ("--clip-grad -1", "clip_grad must be above 0"),
        ("--ema-decay 2", "ema_decay must be at least 0 and below 1, not 2.0"),
        ("--weight-decay nan", "weight_decay must be within 0 … 100, not nan"),
        ("--decay-milestones 30 30", "decay_milestones must be"),
        ("--cutmix-minmax 0.9 0.1", "cutmix_minmax must be 2 numbers within 0 … 1, each above"),
        ("--img-size-schedule {0:64,-1:32}", "img_size_schedule must be"),
        ("--in-chans 4", "in_chans must be one of 1, 3, not '4'"),
        ("--sched step --decay-rate 2", "decay_rate must be at most 1 with sched step"),
        ("--aa nonsense", "aa must be a policy of rand, augmix, original"),
        ("--aa rand-x3", "rand may be followed by m, n, .* not 'x3'"),
        ("--aa rand-m9-n999999", "not 'n999999'"),
        ("--aa rand-m9-tnothing", "not 'tnothing'"),
        ("--lr 1" + "0" * 400, "lr must be within 0 … 1000, not inf"),
    ],
)
def test_invalid_command_lines(words, message):
    with pytest.raises(RecipeError, match=message):
        parse_command_line(words.split(" "))


@pytest.mark.parametrize(
    "aa",
    [
        *("rand-m9-mstd0.5-inc1", "augmix-m3-w3-a0.4", "original", "originalr", "v0", "v0r", "3a"),
        *("rand-m9-n3-p0.5-mmax15", "rand-mstd101-tweights", "rand-t3aw", "original-mstd0.5"),
        *("augmix-m5-w4-d2-b1-mstd1", "none"),
    ],
)
def test_the_policies_of_timm(aa):
    recipe, _ = parse_command_line([f"--aa={aa}"])
    assert recipe.aa == (None if aa == "none" else aa)


def test_the_help_shows_the_ranges(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "label smoothing; at least 0 and below 1 (default: 0.1)" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown key 'batchsize'; did you mean batch_size"),
        ("variants: {van_b0: {dropp: 1}}\nmodel: van_b0", "variant van_b0: unknown key 'dropp'"),
        ("variants: [van_b0]", "variants must map"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("[" * 1000, "is not YAML: nested too deeply"),
        ("lr: !!int", "is not YAML"),
        ("lr: 1\nepochs: 3\nlr: 2", "duplicate key 'lr' .* line 3"),
        ("model_args: {a: 1, a: 2}", "duplicate key 'a'"),
        (
            "variants: {van_b0: 3}\nmodel: van_b0",
            "variant van_b0: must be a mapping of keys, not 3",
        ),
        ("variants: {}", "unknown model ''$"),
        ("ema: 2", "ema must be bool, not 2"),
        ("mean: 0.5", "mean must be"),
        ("model: 3", "model must be str, not 3"),
        ("model_args: {a: 2001-01-01}", "model_args must be"),
        ("output: ''", "output is empty"),
        ('data: "a\\0b"', "data must be printable text"),
        (BOMB, "mean must be"),
    ],
)
def test_invalid_files(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_yaml_merge_keys_are_not_duplicates(tmp_path):
    path = tmp_path / "variants.yaml"
    path.write_text(
        "variants:\n  van_b0: &first {lr: 1, drop: 0.1}\n  van_b1: &second {<<: *first, lr: 2}\n"
        "  van_b2: {<<: *second, drop: 0.3}\n"
    )
    recipe = load_recipe(path, {"model": "van_b2"})
    assert (recipe.lr, recipe.drop) == (2.0, 0.3)


def test_booleans_may_be_numbers(tmp_path):
    path = tmp_path / "truth.yaml"
    path.write_text("ema: 1\npin_memory: 0\nmomentum: true\n")
    with pytest.raises(RecipeError, match="momentum must be float, not True"):
        load_recipe(path)
    path.write_text("ema: 1\npin_memory: 0\n")
    assert (load_recipe(path).ema, load_recipe(path).pin_memory) == (True, False)


def test_undecodable_files_and_flags(tmp_path, capsys):
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "image.png")
    (tmp_path / "large").write_bytes(b" " * (2**20 + 1))
    for word, message in (
        (f"--config={tmp_path / 'image.png'}", "is not UTF-8 text"),
        (f"--config={tmp_path / 'large'}", "is larger than 1048576 bytes"),
        (f"--config={tmp_path}", "Is a directory"),
        ("--batch-size", "argument --batch-size/--batch_size: expected one argument"),
        ("--no-ema=1", "ignored explicit argument '1'"),
    ):
        assert train_cls.main([word]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_print_config(family, capsys):
    assert train_cls.main(["--config", str(family), "--model", "van_b2", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"], printed["drop_path"]) == ("van_b2", 0.2)


def test_differences_name_what_changes_a_result():
    earlier = vars(Recipe(lr=1e-3, name="a"))
    assert differences(Recipe(lr=2e-3, name="b"), earlier) == ["lr: 0.001 → 0.002"]
