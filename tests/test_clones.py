"""A clone contains the files under version control, and programs in it respect time limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import clones
import pytest
from clones import ROOT, Workshop, fresh_clone


@pytest.mark.parametrize("has_git", [True, False])
def test_a_clone_starts_fresh(
    has_git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clones._tracked.cache_clear()
    if not has_git:
        monkeypatch.setattr("shutil.which", lambda name: None)
    clone = fresh_clone(tmp_path / "clone")
    clones._tracked.cache_clear()
    for name in ("README.md", "tools/mm.py", "configs/det/_base_/quickstart.py"):
        assert (clone / name).read_bytes() == (ROOT / name).read_bytes()
    assert not {"runs", ".git", ".venv"} & {path.name for path in clone.iterdir()}
    assert not list(clone.rglob("__pycache__"))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    clone = tmp_path_factory.mktemp("clone")
    (clone / "ours.py").write_text("print('imported')\nplace = __file__\n")
    workshop = Workshop(clone, ["ours"])
    yield workshop
    workshop.close()


def test_programs_find_what_is_imported(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/beside.py").write_text("word = 'beside'\n")
    (tmp_path / "tools/program.py").write_text(
        "import beside, os, ours, sys\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv, beside.word, os.environ['A'], os.getcwd(), ours.place)\n"
        "    print('error', file=sys.stderr)\n"
        "    sys.exit()\n"
    )
    said = workshop.run(["tools/program.py", "--x"], tmp_path, 60, {"A": "b"})
    imported = workshop.log.with_name(workshop.log.stem) / "ours.py"
    assert said == f"['tools/program.py', '--x'] beside b {tmp_path} {imported}\nerror\n"
    (tmp_path / "module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    assert workshop.run(["-m", "module", "y"], tmp_path, 60) == "__main__ ['y']\n"


@pytest.mark.parametrize(
    ("text", "seconds", "expected"),
    [
        ("import sys; sys.exit('because')", 60, "ended with 1\nbecause"),
        ("import sys; sys.exit(3)", 60, "ended with 3"),
        (
            "def wrong(): 1 / 0\nwrong()",
            60,
            "ended with 1\n(.|\n)*in wrong(.|\n)*ZeroDivisionError",
        ),
        ("import time\ndef linger(): time.sleep(600)\nlinger()", 1, "Timeout(.|\n)*in linger"),
        ("import os; os.kill(os.getpid(), 9)", 60, "ended with -9"),
    ],
    ids=["words", "number", "error", "hangs", "killed"],
)
def test_what_fails_is_shown(
    text: str, seconds: float, expected: str, workshop: Workshop, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(text)
    with pytest.raises(AssertionError, match=expected):
        workshop.run(["program.py"], tmp_path, seconds)
    (tmp_path / "program.py").write_text("print('still here')")
    assert workshop.run(["program.py"], tmp_path, 60) == "still here\n"


def test_a_library_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/broken.py").write_text("1 / 0")
    with pytest.raises(AssertionError, match="has ended:\n(.|\n)*ZeroDivisionError"):
        Workshop(tmp_path / "clone", ["broken"])
