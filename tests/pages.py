"""Commands and code that the documentation has its readers run."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# All pages except the changelog, which may mention removed things.
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])

LANGUAGES = {
    "sh": "commands",
    "dockerfile": "builds an image, for which there is no daemon here",
    "python": "runs, block after block in one namespace",
    "py": "a part of a file, which does not run by itself",
    "text": "a drawing",
    "yaml": "is read",
}
_BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
# Beginnings of code spans that are commands; a name alone refers to the program.
_PROGRAMS = (
    *("vision-backbones", "python", "python3", "torchrun", "pytest", "mkdocs", "ruff", "mypy"),
    *("pip", "conda", "uv", "apt-get", "apt", "git", "make", "docker", "bash", "sh", "curl"),
    *("wget", "srun", "sbatch", "scontrol", "ssh"),
)
COMMAND = re.compile(rf"(\w+=\S+ )*({'|'.join(_PROGRAMS)}) \S")


def name(page: Path) -> str:
    """The name of a page in messages."""
    return page.relative_to(ROOT).as_posix()


def fenced(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page: language and text, without the block's indentation."""
    return [
        (language, "\n".join(line.removeprefix(indent) for line in text.split("\n")))
        for indent, language, text in _BLOCK.findall(page.read_text())
    ]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return [text for found, text in fenced(page) if found == language]


def commands(page: Path) -> list[str]:
    """The commands of a page, in code blocks and in sentences; a script is one command."""
    found = []
    for text in blocks(page, "sh"):
        found += [text] if text.startswith("#!") else list(lines(text))
    for span in _SPAN.findall(_BLOCK.sub("", page.read_text())):
        if COMMAND.match(span):
            found.append(span.replace("\\|", "|"))
    return found


def strings(page: Path) -> Iterator[str]:
    """The string literals in the Python code of a page."""
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def lines(text: str) -> Iterator[str]:
    """The commands of a block, each as one line without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)
