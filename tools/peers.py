"""Peers of ``benchmark.py``: other libraries, other runtimes, custom code."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
from runtimes import RUNTIMES
from torch import nn

__all__ = ["Create", "create_birder", "create_timm", "is_installed", "peer"]

BIRDER_NAMES = {
    **{f"efficientvit_m{i}": f"efficientvit_msft_m{i}" for i in range(6)},
    **{f"inception_next_{a}": f"inception_next_{a[0]}" for a in ("atto", "tiny", "small", "base")},
    **{f"biformer_{a}": f"biformer_{a[0]}" for a in ("tiny", "small", "base")},
    **{f"litv2_{a}": f"lit_v2_{a}" for a in ("s", "m", "b")},
}

Create = Callable[[str], nn.Module | None]


def create_timm(name: str) -> nn.Module | None:
    """timm's own model of that name, even if we registered one, too."""
    model_class = timm.models.model_entrypoint(name) if timm.models.is_model(name) else None
    if model_class is None or not model_class.__module__.startswith("timm."):
        return None
    return timm.create_model(name)


def create_birder(name: str) -> nn.Module | None:
    """The model of the library ``birder``, https://pypi.org/project/birder."""
    from birder.model_registry import registry

    theirs = BIRDER_NAMES.get(name, name)
    if theirs not in registry.list_models():
        return None
    return registry.net_factory(theirs, 1000)


def peer(name: str) -> tuple[str, Create]:
    """Label and factory of a value of ``--against``.

    Raises:
        ValueError: no such module or file, or one without ``create_model``.
    """
    known: dict[str, Create] = {"timm": create_timm, "birder": create_birder, **RUNTIMES}
    if name in known:
        return name, known[name]
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"--against: there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        label = path.stem
    else:
        try:
            module = importlib.import_module(name)
        except (ModuleNotFoundError, TypeError, ValueError) as error:  # "", ".x"
            raise ValueError(f"--against: {error}") from error
        label = name
    if not hasattr(module, "create_model"):
        raise ValueError(f"--against: {name} has no function create_model(name)")
    return label, module.create_model


def is_installed(label: str) -> bool:
    """Whether the contender is an installed package, which has a version."""
    try:
        return bool(version(label))
    except PackageNotFoundError:
        return False
