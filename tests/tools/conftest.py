"""The scripts of tools/, imported as they import each other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tools() -> Iterator[Callable[[str], ModuleType]]:
    """A function from a script's name to its module, which the test's module shares."""
    before, threads = set(sys.modules), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS / "docs"))
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if path and Path(path).is_relative_to(TOOLS):
            del sys.modules[name]


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest, tools: Callable[[str], ModuleType]) -> ModuleType:
    """The script that the test's module is named after."""
    return tools(request.module.__name__.rpartition(".")[2].removeprefix("test_"))


@pytest.fixture(scope="module")
def contenders(tools: Callable[[str], ModuleType]) -> ModuleType:
    return tools("contenders")
