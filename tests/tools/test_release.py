"""`make release`, and the files of a release: workflows, forms, metadata, changelog."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from clones import ROOT, fresh_clone
from readme_renderer import markdown

import backbones

_WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
_TREE = ("CHANGELOG.md", "pyproject.toml", "backbones/__init__.py", ".ci/release")


def _git(folder: Path, *words: str) -> str:
    run = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with what a release reads and changes."""
    for name in _TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".ci" / "release").chmod(0o755)
    _git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    _git(tmp_path, "config", "user.name", "Somebody")
    _git(tmp_path, "config", "user.email", "somebody@example.org")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "--message", "Begin")
    return tmp_path


def _release(tree: Path, version: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / ".ci" / "release", version],
        env={**os.environ, "DRY_RUN": "1", "RESUME": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_dry_run_names_all_steps_and_changes_nothing(tree):
    before = _git(tree, "rev-parse", "HEAD")
    run = _release(tree, "0.2.0")
    assert run.returncode == 0, run.stderr
    steps = [line[2:] for line in run.stdout.splitlines() if line.startswith("+ ")]
    order = (
        *(".ci/run", "make test-slow", "make wheel wheel-aarch64", "hatchling build -t sdist"),
        *("venv", "pip' install", "import backbones", "twine check", "sha256sum", "make docs"),
        "mike deploy --update-aliases 0.2.0 latest",
        "mike set-default latest",
    )
    places = [next(i for i, step in enumerate(steps) if text in step) for text in order]
    assert places == sorted(places)
    assert "Start 0.3.0" in run.stdout and "Release 0.2.0" in run.stdout
    # The changelog's entries are the notes.
    text = (ROOT / "CHANGELOG.md").read_text()
    section = text.split("## [Unreleased]\n", 1)[1].split("\n## [", 1)[0]
    entries = [line for line in section.splitlines() if line.startswith("- ")]
    assert [line for line in run.stdout.splitlines() if line.startswith("- ")] == entries
    assert "### Moved and breaking" in run.stdout and "<!--" not in run.stdout
    assert _git(tree, "rev-parse", "HEAD") == before
    assert not _git(tree, "tag") and not _git(tree, "status", "--porcelain")


@pytest.mark.parametrize("version", ["", "0.2", "v0.2.0", "0.2.0.dev0", "00.2.0", "0.1.9"])
def test_other_versions_are_rejected(tree, version):
    run = _release(tree, version)
    assert run.returncode == 1 and f"{version}" in run.stderr and not run.stdout


def _without_news(tree: Path) -> None:
    text = (tree / "CHANGELOG.md").read_text()
    start, end = text.index("## [Unreleased]\n"), text.index("\n## [0.")
    (tree / "CHANGELOG.md").write_text(f"{text[:start]}## [Unreleased]\n{text[end:]}")
    _git(tree, "commit", "--quiet", "--all", "--message", "Empty it")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tree: (tree / "new").touch(), "?? new"),
        (lambda tree: _git(tree, "tag", "v0.2.0"), "the tag v0.2.0 exists"),
        (_without_news, "lists nothing"),
        (lambda tree: _git(tree, "remote", "add", "origin", "https://x.org"), "https://x.org"),
    ],
    ids=["changes", "tag", "news", "origin"],
)
def test_trees_that_cannot_be_released(spoil, said, tree):
    spoil(tree)
    run = _release(tree, "0.2.0", DRY_RUN="" if "x.org" in said else "1")
    assert run.returncode == 1 and said in run.stderr


@pytest.fixture
def stand_ins(tree: Path) -> dict[str, str]:
    """An environment with programs that stand for those of the long steps, in a committed tree.

    Their calls are listed in the file CALLS. ``make docs`` runs the file BROKEN.
    """
    outside = tree.parent / f"{tree.name}-programs"
    outside.mkdir()
    environment = {"CALLS": f"{outside}/calls", "BROKEN": f"{outside}/broken", "DRY_RUN": ""}
    programs = {
        outside / "make": """case $1 in
wheel) mkdir -p dist; touch dist/x-$(uname -m).whl dist/x-aarch64.whl;;
docs) ! test -e $BROKEN || . $BROKEN;;
esac""",
        outside / "python3": 'mkdir -p "$3/bin"; printf "#!/bin/sh\\n" >"$3/bin/pip"; '
        'cp "$3/bin/pip" "$3/bin/python"; chmod +x "$3"/bin/*',
        tree / ".ci" / "run": "",
        tree / ".venv" / "bin" / "python": 'test "$2" != hatchling || '
        "{ mkdir -p dist; touch dist/x.tar.gz; }",
        tree / ".venv" / "bin" / "mike": "mkdocs && git branch --force gh-pages",
        tree / ".venv" / "bin" / "mkdocs": "",
    }
    for path, text in programs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{path.name} $*" >>$CALLS\n{text}\n')
        path.chmod(0o755)
    _git(tree, "add", "--force", ".")
    _git(tree, "commit", "--quiet", "--message", "Stand-ins")
    _git(tree, "remote", "add", "origin", f"{_urls()['Repository']}.git")
    return environment | {"PATH": f"{outside}:{os.environ['PATH']}"}


def test_a_release_comes_back_as_two_commits_and_a_tag(tree, stand_ins, tmp_path_factory):
    before = _git(tree, "rev-parse", "HEAD").strip()
    scratch = tmp_path_factory.mktemp("scratch")
    run = _release(tree, "0.2.0", **stand_ins, TMPDIR=str(scratch))
    assert run.returncode == 0, run.stdout + run.stderr
    assert not list(scratch.iterdir())
    _assert_released(tree, before)
    assert "git push origin main gh-pages v0.2.0" in run.stdout


@pytest.mark.parametrize(("end", "status"), [("exit 7", 7), ("kill $PPID; exit 7", 143)])
def test_a_release_goes_on_where_it_failed(end, status, tree, stand_ins, tmp_path_factory):
    before = _git(tree, "rev-parse", "HEAD").strip()
    broken, calls = Path(stand_ins["BROKEN"]), Path(stand_ins["CALLS"])
    broken.write_text(end)
    scratch = tmp_path_factory.mktemp("scratch")
    run = _release(tree, "0.2.0", **stand_ins, TMPDIR=str(scratch))
    assert run.returncode == status and f"status {status}: make docs" in run.stderr
    (work,) = scratch.iterdir()
    resume = f"make release VERSION=0.2.0 RESUME={work}"
    assert f"{work}/tree" in run.stderr and resume in run.stderr
    assert (work / "tree" / "dist" / "SHA256SUMS").exists()
    assert _git(tree, "rev-parse", "HEAD").strip() == before and not _git(tree, "tag")

    for version, dry, said in [("0.2.1", "", "no release of 0.2.1"), ("0.2.0", "1", "exclusive")]:
        wrong = _release(tree, version, **stand_ins | {"DRY_RUN": dry}, RESUME=str(work))
        assert wrong.returncode == 1 and said in wrong.stderr and work.exists()

    broken.unlink()
    calls.unlink()
    run = _release(tree, "0.2.0", **stand_ins, RESUME=str(work))
    assert run.returncode == 0, run.stdout + run.stderr
    # Nothing that had passed runs again.
    assert calls.read_text().startswith("make docs\n")
    _assert_released(tree, before)
    assert not work.exists()


def _assert_released(tree: Path, before: str) -> None:
    subjects = _git(tree, "log", "--format=%s", f"{before}..HEAD").splitlines()
    assert subjects == ["Start 0.3.0", "Release 0.2.0"]
    assert '__version__ = "0.3.0.dev0"' in (tree / "backbones" / "__init__.py").read_text()
    assert '__version__ = "0.2.0"' in _git(tree, "show", "v0.2.0:backbones/__init__.py")
    log = _git(tree, "show", "v0.2.0:CHANGELOG.md")
    repository = _urls()["Repository"]
    assert f"[Unreleased]: {repository}/compare/v0.2.0...HEAD" in log
    assert re.search(rf"^\[0\.2\.0\]: {repository}/compare/[0-9a-f]+\.\.\.v0\.2\.0$", log, re.M)
    assert re.search(r"^## \[Unreleased\]\n\n## \[0\.2\.0\] - \d{4}-\d\d-\d\d$", log, re.M)
    kept = {path.name for path in (tree / "dist" / "0.2.0").iterdir()}
    assert {"SHA256SUMS", "notes.md", "x.tar.gz"} < kept


def _urls() -> dict[str, str]:
    section = (ROOT / "pyproject.toml").read_text().split("[project.urls]\n", 1)[1]
    return dict(re.findall(r'^(\w+) = "(.*)"$', section.split("\n\n", 1)[0], re.M))


def test_addresses_and_versions_agree():
    repository = _urls()["Repository"]
    assert all(_urls()[name].startswith(repository) for name in ("Changelog", "Issues"))
    names = ("CHANGELOG.md", "CITATION.cff", "SECURITY.md", "pyproject.toml")
    names += (".github/ISSUE_TEMPLATE/config.yml",)
    for text in ((ROOT / name).read_text() for name in names):
        assert set(re.findall(r"https://github\.com/[\w-]+/vision-backbones", text)) == {repository}
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert headings[0] == "Unreleased"
    assert headings == re.findall(r"^\[(.+?)\]: https://", text, re.M)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distribution and a wheel of a fresh clone."""
    folder = tmp_path_factory.mktemp("packed")
    clone = fresh_clone(folder / "clone")
    made = {}
    for kind in ("sdist", "wheel"):
        code = f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=clone,
            env={**os.environ, "VISION_BACKBONES_NATIVE": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        made[kind] = folder / run.stdout.split()[-1]
    return made


def _metadata(package: Path) -> str:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            return wheel.read(name).decode()
    with tarfile.open(package) as source:
        (name,) = (n for n in source.getnames() if n.count("/") == 1 and n.endswith("/PKG-INFO"))
        file = source.extractfile(name)
        assert file is not None
        return file.read().decode()


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_readme_works_on_pypi(kind, packed):
    """Its links lead to the tag's files, which the tree has, and nothing else of it changes."""
    head, text = _metadata(packed[kind]).split("\n\n", 1)
    assert "Description-Content-Type: text/markdown" in head
    shown = markdown.render(text)
    assert shown is not None
    found = re.findall(r' (?:href|src)="([^"#]+)', shown)
    repository, tag = _urls()["Repository"], f"v{backbones.__version__}"
    pages = f"{repository}/blob/{tag}/"
    files = f"{repository.replace('github.com', 'raw.githubusercontent.com')}/{tag}/"
    own = [address for address in found if address.startswith((pages, files))]
    relative = [address for address in found if not address.startswith("https://")]
    assert len(own) > 30 and not relative
    for address in own:
        path = address.removeprefix(pages).removeprefix(files)
        assert (ROOT / path).is_file(), path
        assert address.startswith(files) == path.endswith(".png"), address
    readme = (ROOT / "README.md").read_text()
    assert text.replace(pages, "").replace(files, "").strip() == readme.strip()


def test_packages_pass_the_check_of_twine(packed):
    command = [sys.executable, "-m", "twine", "check", "--strict", *packed.values()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("PASSED") == 2


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", _WORKFLOWS),
        (
            "github-issue-forms",
            [ROOT / f".github/ISSUE_TEMPLATE/{n}.yml" for n in ("fault", "slow", "model")],
        ),
        ("github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_follow_their_schemas(schema, files):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    run = subprocess.run([*command, *files], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", _WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_the_tree_has(path, tmp_path):
    """And actions at commits, but for the branch from which PyPA wants its own to be used."""
    for used in re.findall(r"uses: (\S+)", path.read_text()):
        pinned = re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", used)
        assert pinned or used.startswith("./") or used == "pypa/gh-action-pypi-publish@release/v1"
    jobs = yaml.safe_load(path.read_text())["jobs"]
    targets = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.M))
    for name, job in jobs.items():
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= jobs.keys(), name
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
        for step in job.get("steps", ()):
            script = step.get("run", "")
            for target in re.findall(r"\bmake ([\w-]+)", script):
                assert any(known.startswith(target) for known in targets), target
            for file in re.findall(r"(?:^|\s)(\.ci/\w+|tools/\S+|backbones/\S+)", script):
                assert (ROOT / file).exists(), file
            # Values of an event stand in variables, never in a script.
            assert "github.event" not in script and "github.ref_name" not in script


def test_only_one_job_may_publish():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    holders = [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})]
    assert holders == ["publish"] and set(jobs["publish"]["needs"]) == {"wheels", "check"}
