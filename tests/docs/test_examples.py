"""The Python in the pages runs, and the commands name files and options that there are."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from backbones.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [DOCS / "index.md", *DOCS.glob("guides/*.md"), *DOCS.glob("families/*.md")],
    key=lambda page: page.as_posix(),
)
SCRIPT = r"(tools/\w+|train_cls)\.py"
BLOCK = re.compile(r"^( *)```(python|sh)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page in one language."""
    found = BLOCK.findall(page.read_text())
    return [
        "\n".join(line.removeprefix(indent) for line in text.split("\n"))
        for indent, name, text in found
        if name == language
    ]


def ids(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [
    page for page in sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")]) if blocks(page, "sh")
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=ids(WITH_PYTHON))
def test_python_runs(page, tmp_path, monkeypatch):
    """Block after block in one namespace, as somebody would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=ids(WITH_COMMANDS))
def test_commands_exist(page):
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for word in words:
                if word.startswith(("tools/", "configs/", "tests/")) or word == "train_cls.py":
                    assert (ROOT / word).exists(), f"{line}: there is no {word}"
            if words[:1] == ["make"]:
                check_targets(words[1:])
            elif words[:1] == ["vision-backbones"]:
                check_command(words[1], words[2:])
            elif script := next((w for w in words if re.fullmatch(SCRIPT, w)), None):
                check_options(ROOT / script, words[words.index(script) + 1 :])


def check_targets(targets: list[str]) -> None:
    """The Makefile has them."""
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make has no {target}"


def check_command(name: str, words: list[str]) -> None:
    """The sub-command takes these words."""
    path, _ = COMMANDS[name]
    if path.endswith(".py"):
        check_options(ROOT / "tools" / path, words)
        return
    parser = argparse.ArgumentParser(prog=name)
    importlib.import_module(path).add_arguments(parser)
    parser.parse_args(words)


def check_options(script: Path, words: list[str]) -> None:
    """Each option stands in the script, or in a module of ours that it imports."""
    texts = {path: path.read_text() for path in with_imports(script)}
    fields = "".join(text for path, text in texts.items() if path.name == "recipe.py")
    for word in words:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            is_spelled = any(f'"--{name}"' in text for text in texts.values())
            # Recipes make their options from the names of fields.
            is_field = f"    {name.replace('-', '_')}:" in fields
            assert is_spelled or is_field, f"{script.name} has no {word}"


@functools.cache
def with_imports(script: Path) -> frozenset[Path]:
    """The file, and those of ``backbones/`` and of its own folder that it imports in the end."""
    found: set[Path] = set()
    left = [script]
    while left:
        path = left.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names] + [str(node.module)]
            for name in names:
                for base in (ROOT, script.parent):
                    file = base / f"{name.replace('.', '/')}.py"
                    if file.is_file() and file not in found:
                        left.append(file)
    return frozenset(found)
