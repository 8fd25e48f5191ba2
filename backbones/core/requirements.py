"""Missing or incompatible requirements, and the command that installs them."""

from __future__ import annotations

import importlib.metadata
import shlex
from dataclasses import dataclass

__all__ = ["Unmet", "explanation", "unmet"]


@dataclass(frozen=True)
class Unmet:
    """A package that is missing or has an incompatible version.

    Attributes:
        wanted: name and version specifier, for pip.
        found: the installed version; None if there is none.
    """

    wanted: str
    found: str | None

    @property
    def fix(self) -> str:
        """The command that installs it."""
        return f"pip install {shlex.quote(self.wanted)}"


def unmet() -> list[Unmet]:
    """The unmet requirements of vision-backbones, without extras."""
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
    """The message for a failed import; None if all requirements are met."""
    try:
        packages = unmet()
    except ImportError:  # `packaging` comes with timm
        return None
    if not packages:
        return None
    told = ", ".join(f"{p.wanted} (found: {p.found or 'nothing'})" for p in packages)
    wanted = " ".join(shlex.quote(p.wanted) for p in packages)
    return f"vision-backbones needs {told}: {error}. Run `pip install {wanted}`."


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
