"""Which packages this library needs and does not find, and the command that brings them."""

from __future__ import annotations

import importlib.metadata
import shlex
from dataclasses import dataclass

__all__ = ["Unmet", "explanation", "unmet"]


@dataclass(frozen=True)
class Unmet:
    """A package that is missing or of another version.

    Attributes:
        wanted: name and versions, as pip takes them.
        found: the version that is installed; None if there is none.
    """

    wanted: str
    found: str | None

    @property
    def fix(self) -> str:
        """The command that installs it."""
        return f"pip install {shlex.quote(self.wanted)}"


def unmet() -> list[Unmet]:
    """What ``pip install vision-backbones`` asks for and is not there; no extras."""
    from packaging.requirements import Requirement

    found = []
    for line in importlib.metadata.requires("vision-backbones") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(Unmet(f"{requirement.name}{requirement.specifier}", version))
    return found


def explanation(error: BaseException) -> str | None:
    """What to say of a failed import; None if all that is needed is there."""
    try:
        packages = unmet()
    except ImportError:  # `packaging` comes with timm
        return None
    if not packages:
        return None
    told = ", ".join(f"{p.wanted} (found: {p.found or 'nothing'})" for p in packages)
    wanted = " ".join(shlex.quote(p.wanted) for p in packages)
    return f"vision-backbones needs {told}: {error}. `pip install {wanted}` brings it."


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
