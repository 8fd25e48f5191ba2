"""Imports go one way: tools and scripts → backbones → ops, without cycles; importing is cheap."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest
from fresh_python import run_code

import backbones

ROOT = Path(__file__).parent.parent


def _modules() -> dict[str, Path]:
    paths = [path for top in ("backbones", "ops") for path in sorted(ROOT.glob(f"{top}/**/*.py"))]
    return {".".join(_parts(path)): path for path in paths}


def _parts(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = _modules()
FAMILIES = backbones.list_families()


@functools.cache
def _imports(path: Path) -> set[str]:
    """The imports of a file, including those in functions and those for type checking only."""
    names, pending = set(), [ast.parse(path.read_text())]
    while pending:
        node: ast.AST = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            pending += ast.iter_child_nodes(node)
    return names


def _within(name: str, room: str) -> bool:
    return f"{name}.".startswith(f"{room}.")


def _rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"backbones.{name}" for name in names)


_TOOLS = _rooms("embedding", "openmmlab", "restoration", "training")
# Part → parts that it must not import from.
CLOSED_DOORS = {
    "ops": ("backbones", "tools", "train_cls"),
    "ops.cpu": ("ops.attention", "ops.inference", "ops.neighborhood", "ops.replay"),
    "ops.replay": ("ops.attention", "ops.inference", "ops.neighborhood"),
    "ops.attention": ("ops.inference", "ops.replay"),
    "ops.neighborhood": ("ops.inference", "ops.replay"),
    "backbones": ("tools", "train_cls"),
    "backbones.common": _rooms("fusing", "core", "data", "cli", *FAMILIES) + _TOOLS,
    "backbones.fusing": _rooms("core", "data", "cli", *FAMILIES) + _TOOLS,
    "backbones.core": _rooms("data", "cli", *FAMILIES) + _TOOLS,
    **{room: _rooms("data", "cli") + _TOOLS for room in _rooms(*FAMILIES)},
    "backbones.data": _rooms("fusing", "core", "cli", *FAMILIES) + _TOOLS,
    **{
        room: (*_rooms("cli", *FAMILIES), *(other for other in _TOOLS if other != room))
        for room in _TOOLS
    },
}
# The one way between two tools: restoration models are trained by the loop of training.
_LOOP = {
    "backbones.restoration.recipe": {"backbones.training.recipe"},
    "backbones.restoration.train": {
        f"backbones.training.{module}" for module in ("build", "loop", "record", "run")
    },
}


@pytest.mark.parametrize("room", CLOSED_DOORS)
def test_layers_import_downwards_only(room):
    for name, path in MODULES.items():
        if _within(name, room):
            for imported in _imports(path):
                if any(_within(imported, module) for module in _LOOP.get(name, ())):
                    continue
                upward = [other for other in CLOSED_DOORS[room] if _within(imported, other)]
                assert not upward, f"{name} imports {imported}"


def test_the_engine_knows_no_layers():
    """``ops/cpu`` imports nothing from the plain layers next to it."""
    plain = {f"ops.{path.stem}" for path in ROOT.glob("ops/*.py")}
    plain -= {"ops.__init__", "ops.arguments"}
    for name, path in MODULES.items():
        if _within(name, "ops.cpu"):
            assert not [i for i in _imports(path) if any(_within(i, p) for p in plain)], name


def _family(name: str) -> str | None:
    return next((f for f in FAMILIES if _within(name, f"backbones.{f}")), None)


def test_families_do_not_know_each_other():
    for name, path in MODULES.items():
        if (family := _family(name)) is not None:
            assert {_family(imported) for imported in _imports(path)} <= {family, None}, name


def test_no_import_cycles():
    """Repeatedly remove modules whose imports have all been removed; none may remain."""
    pending = {name: _own_imports(path) - {name} for name, path in MODULES.items()}
    while ready := {name for name, imported in pending.items() if not imported & pending.keys()}:
        for name in ready:
            del pending[name]
    assert not pending


def _own_imports(path: Path) -> set[str]:
    """Imported modules: in ``from package import name``, the package or its submodule ``name``."""
    found = set()
    for name in _imports(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


_ADDED = """
import sys
import timm
before = set(sys.modules)
import {}
print(*sorted(sys.modules.keys() - before))
"""
# Of tools and applications, which import what is slow to import.
_ON_DEMAND = _rooms("cli", "data") + _TOOLS


def test_import_is_cheap(tmp_path):
    """`import backbones` imports nothing that `import timm` does not, but for its own modules."""
    added = run_code(_ADDED.format("backbones"), tmp_path).split()
    assert "backbones.van" in added
    packages = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert packages == {"backbones", "ops"}
    assert not [name for name in added if any(_within(name, room) for room in _ON_DEMAND)]


def test_a_foreign_ops_is_named(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import backbones"
    with pytest.raises(AssertionError, match="ended with 1\n") as raised:
        run_code(code, tmp_path)
    said = str(raised.value)
    assert "ImportError: `backbones` needs its own package `ops`" in said
    assert str(tmp_path / "ops") in said.splitlines()[-1]
