"""Any recipe or command line gives a run or a one-line error."""

from __future__ import annotations

import contextlib
import io
import math
import os
import typing
import urllib.error
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from fuzzing import NUMBERS, anything, fuzz
from hypothesis import given
from hypothesis import strategies as st
from training_runs import QUICK, make_images

import train_cls
from backbones.common.errors import RecipeError
from backbones.common.keys import Range, fields_of, inner_type, range_of
from backbones.restoration.recipe import RestorationRecipe
from backbones.training.command_line import load_recipe
from backbones.training.loop import TrainingLoop
from backbones.training.recipe import FIELDS, Recipe

PATHS = ("output", "name", "data_dir")
MODEL_ARGS = yaml.safe_load(next(w for w in QUICK if "model-args" in w).partition("=")[2])
TINY = {
    **{"model": "shvit_s1", "model_args": MODEL_ARGS, "img_size": 32, "batch_size": 4},
    **{"workers": 0, "threads": 1, "device": "cpu", "lr": 1e-3, "epochs": 1, "warmup_epochs": 0},
    **{"save_every_minutes": 0, "name": "run", "overwrite": True},
}
WORDS = st.one_of(
    # Not those that this Python does not know, and would not call printable.
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12),
    st.sampled_from(
        [
            *("nan", "-inf", "1e400", "-1", "0x10", "1,2", "[1, 2", "[]", "{}", "{a: 1}", "{1: 2}"),
            *("none", "null", "auto", "~", "true", "", " ", "\0", "\ud800", "💥", "٣", "a" * 5000),
            *("!!int", "!!timestamp x", "*x", "2001-99-99", "rand-m9-n99999999", "original-x"),
            *("sgd", "adan", "lookahead_adamw", "cosine", "plateau", "agc", "meta", "cuda:99"),
            *("soft", "van_b0", "shvit_s9", "[" * 2000, "{0: {0: 1}}", "cifar10", "digits"),
            *("wds/nowhere", "torch/nowhere", "torch/cifar10", "medmnist/x", "nowhere/../x"),
        ]
    ),
)
HOSTILE = anything(WORDS, st.dates(), st.binary(max_size=4), NUMBERS)


def stays_here(key: str, value: Any) -> bool:
    """A fuzzer must not write outside its folder."""
    return key not in PATHS or not isinstance(value, str) or not {"/", "."} & set(value)


RECIPES = st.dictionaries(st.sampled_from(list(FIELDS)), HOSTILE, min_size=1, max_size=3).filter(
    lambda keys: all(stays_here(k, v) for k, v in keys.items())
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    make_images(root / "images", {"train": 4, "val": 3})
    (root / "binary").write_bytes(bytes(range(256)))
    before = os.getcwd()
    os.chdir(root)  # what a recipe names relatively lies there
    yield root
    os.chdir(before)


def offline(*_: Any, **__: Any) -> None:
    raise urllib.error.URLError("no network in this test")


def assert_told(argv: list[str]) -> None:
    """Run it up to the first update."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch, "set_num_threads"))
        stack.enter_context(patch.object(torch.hub, "download_url_to_file", offline))
        stack.enter_context(patch.object(TrainingLoop, "run", lambda self: 0))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of timm, about schedules and optimizers
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        status = train_cls.main(argv)
    said = err.getvalue()
    if status == 0:
        assert not said
    else:
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert said.isprintable() or said[:-1].isprintable()
        assert len(said) < 2000 and "weights_only" not in said


def many(quick: int, slow: int) -> Any:
    """A few cases in the quick suite, all of them in the slow one."""
    return pytest.mark.parametrize("examples", [quick, pytest.param(slow, marks=pytest.mark.slow)])


@many(20, 1000)
def test_recipes(examples, folder):
    @fuzz(examples)
    @given(RECIPES)
    def check(keys: dict[str, Any]) -> None:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({"data": str(folder / "images"), **TINY, **keys}))
        assert_told(["--config", str(path)])

    check()


@many(20, 500)
def test_not_a_recipe(examples, folder):
    @fuzz(examples)
    @given(st.one_of(st.binary(), WORDS.map(lambda t: t.encode(errors="surrogatepass"))))
    def check(data: bytes) -> None:
        path = folder / "recipe.yaml"
        path.write_bytes(data)
        with contextlib.suppress(RecipeError):
            assert load_recipe(path) == Recipe()

    check()


FLAGS = [f"--{name}" for name in FIELDS] + [f"--{name.replace('_', '-')}" for name in FIELDS]
FLAGS += ["--config", "--print-config", "--no-ema", "--no-such-flag", "--"]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Flags with and without values, and words that belong to none."""
    words: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        flag = draw(st.sampled_from(FLAGS))
        value = draw(
            st.one_of(
                WORDS,
                NUMBERS.map(str) if draw(st.booleans()) else st.floats().map(str),
                st.sampled_from(["binary", "images", "nowhere", "images/train/class0/000.png"]),
            ).filter(lambda v, flag=flag: stays_here(flag[2:].replace("-", "_"), v))
        )
        words += draw(st.sampled_from([[flag, value], [f"{flag}={value}"], [flag], [value]]))
    return [word for word in words if word not in ("-h", "--help")]


@many(20, 1000)
def test_command_lines(examples, folder):
    base = [*QUICK, f"--data={folder / 'images'}", "--epochs=1", "--name=run", "--overwrite"]

    @fuzz(examples)
    @given(command_lines())
    def check(words: list[str]) -> None:
        assert_told([*base, "--batch-size=4", *words])

    check()


# --- the ranges


def numeric(hint: Any) -> bool:
    inner = inner_type(hint)
    return inner in (int, float) or bool(
        {int, float} & set(typing.get_args(inner)[-1:])
        or {int, float} & set(typing.get_args(inner)[:1])
    )


def ranges(kind: type) -> dict[str, Range]:
    spans = {name: range_of(f) for name, f in fields_of(kind).items()}
    return {name: span for name, span in spans.items() if span is not None}


@pytest.mark.parametrize("kind", [Recipe, RestorationRecipe])
def test_every_number_has_a_range(kind):
    hints = typing.get_type_hints(kind)
    numbers = {name for name in fields_of(kind) if numeric(hints[name])}
    assert numbers - {"in_chans"} <= ranges(kind).keys()  # which is one of two values
    for name, span in ranges(kind).items():
        assert math.isfinite(span.low) or math.isfinite(span.above), name
        assert math.isfinite(span.high) or math.isfinite(span.below), name
        default = fields_of(kind)[name].default
        if isinstance(default, (int, float, tuple)):
            assert span.holds(default), name
