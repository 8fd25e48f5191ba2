"""The Python in the pages runs, and the commands name files and options that there are."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
import yaml
from pages import ROOT, blocks, fenced
from stand_ins import DOWNLOADS

from backbones.cli.main import COMMANDS

SCRIPT = r"(tools/\w+|train_cls)\.py"
WITH_PYTHON = [page for page in pages.PAGES if blocks(page, "python")]
# Its sections are run one by one in tests/downstream, with what is tested of them there.
WITH_PYTHON.remove(ROOT / "docs/downstream.md")
WITH_COMMANDS = [page for page in pages.PAGES if pages.commands(page)]
# Files that say at their top how they are called, or what calls them.
CALLED = sorted(
    [ROOT / "train_cls.py", *ROOT.glob("tools/*.py"), *ROOT.glob("configs/*/*.yaml")]
    + [*ROOT.glob("configs/*/quickstart*.py")]
)
# What the reader of a page has, by its name in the code.
NAMES = {"README.md": {key: torch.zeros(1, 16, 16, 2, 4) for key in ("query", "key", "value")}}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=pages.name)
def test_python_runs(page, shelf, tmp_path, monkeypatch):
    """Block after block in one namespace, as somebody would type them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / DOWNLOADS))
    namespace: dict[str, Any] = {"__name__": "page", **NAMES.get(pages.name(page), {})}
    code = [compile(text, str(page), "exec") for text in blocks(page, "python")]
    shelf.provide([pages.name(page), *pages.strings(page)], tmp_path)
    for part in code:
        exec(part, namespace)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_blocks_are_of_a_known_language(page):
    """What is in another one, such as ``bash``, no test here would look at."""
    for language, text in fenced(page):
        assert language in pages.LANGUAGES, text
        if language in ("python", "py"):
            ast.parse(text)
        elif language == "yaml":
            assert yaml.safe_load(text)
        elif text.startswith("#!/bin/bash"):
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=pages.name)
def test_commands_exist(page):
    for text in pages.commands(page):
        for line in pages.lines(text):
            check(shlex.split(line))


@pytest.mark.parametrize("file", CALLED, ids=pages.name)
def test_commands_at_the_top_of_files_exist(file):
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
    else:
        head = re.match(r"(#.*\n)*", file.read_text())
        text = "" if head is None else re.sub("^#", "", head[0], flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if pages.COMMAND.match(line.strip()):
            check(shlex.split(line, comments=True))


def check(words: list[str]) -> None:
    """A command names files, targets, extras and options that there are."""
    for word in words:
        if word.startswith(("tools/", "configs/", "tests/")) or word == "train_cls.py":
            assert (ROOT / word).exists(), f"{shlex.join(words)}: there is no {word}"
    makefile, project = ((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    if words[:1] == ["make"]:
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make has no {target}"
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", " ".join(words[2:])))):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"there is no {extra}"
    elif words[:1] == ["vision-backbones"]:
        parser = argparse.ArgumentParser(prog=words[1])
        importlib.import_module(COMMANDS[words[1]][0]).add_arguments(parser)
        parser.parse_args(words[2:])
    elif script := next((w for w in words if re.fullmatch(SCRIPT, w)), None):
        check_options(ROOT / script, words[words.index(script) + 1 :])


def check_options(script: Path, words: list[str]) -> None:
    """Each option stands in the script, or in a module of the library that declares options."""
    files = [script, *script.parent.glob("*.py"), *(ROOT / "backbones").rglob("*.py")]
    texts = {path: text_of(path) for path in files}
    declared = ("recipe.py", "loaded.py")
    fields = "".join(text for path, text in texts.items() if path.name in declared)
    for name in (word[2:].split("=")[0] for word in words if word.startswith("--")):
        is_spelled = any(f'"--{name}"' in text for text in texts.values())
        # Recipes make their options from the names of fields.
        is_field = f"    {name.replace('-', '_')}:" in fields
        assert is_spelled or is_field, f"{script.name} has no --{name}"


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()
