"""Missing or incompatible requirements, and the command that installs them."""

from __future__ import annotations

import importlib.metadata
import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Unmet:
    """A package that is missing or has an incompatible version."""

    requirement: str  # name and version specifier, for pip
    found: str | None  # the installed version

    @property
    def fix(self) -> str:
        """The command that installs it."""
        return f"pip install {shlex.quote(self.requirement)}"


def unmet() -> list[Unmet]:
    """The unmet requirements of vision-backbones, without extras."""
    from packaging.requirements import Requirement

    found = []
    for line in importlib.metadata.requires("vision-backbones") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
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
    needed = ", ".join(f"{p.requirement} (found: {p.found or 'nothing'})" for p in packages)
    arguments = " ".join(shlex.quote(p.requirement) for p in packages)
    return f"vision-backbones needs {needed}: {error}. Run `pip install {arguments}`."


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
