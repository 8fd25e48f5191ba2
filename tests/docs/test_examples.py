"""The Python in the pages runs, and the commands name files and options that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [DOCS / "index.md", *DOCS.glob("guides/*.md"), *DOCS.glob("families/*.md")],
    key=lambda page: page.as_posix(),
)
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
    return [page.relative_to(DOCS).as_posix() for page in pages]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if blocks(page, "sh")]


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
            check(words, line)


def check(words: list[str], line: str) -> None:
    """Scripts and configs are there, and each option stands in the script or what it imports."""
    for word in words:
        if word.startswith(("tools/", "configs/", "tests/")) or word == "train_cls.py":
            assert (ROOT / word).exists(), f"{line}: there is no {word}"
    script = next((word for word in words if word.endswith(".py") and (ROOT / word).exists()), None)
    if words[:1] == ["make"]:
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    if words[:1] == ["vision-backbones"]:
        script = f"backbones/cli/{words[1]}.py"
        assert (ROOT / script).exists(), f"{line}: there is no command {words[1]}"
    if script is None:
        return
    known = (ROOT / script).read_text() + "".join(
        path.read_text() for package in ("backbones",) for path in (ROOT / package).rglob("*.py")
    )
    for option in words[words.index(script) + 1 :] if script in words else words[2:]:
        if option.startswith("--"):
            name = option[2:].split("=")[0]
            # Recipes make their options from the names of fields.
            spelled = (f'"--{name}"', f"{name.replace('-', '_')}:")
            assert any(each in known for each in spelled), f"{line}: {script} has no {option}"
