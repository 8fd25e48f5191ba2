"""Updates whose loss is not finite are skipped and counted; too many in a row end the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backbones.common.errors import MendableError
from backbones.common.files import write_text_atomically


class DivergedError(MendableError, RuntimeError):
    """Loss or weights are not finite: too many times in a row, or in a validation."""


class BadSteps:
    """Count of skipped updates.

    Args:
        allowed: number of consecutive bad updates that end the run.

    Attributes:
        in_a_row: epoch and step of the current consecutive bad updates.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.in_a_row: list[tuple[int, int]] = []

    def note(self, bad: bool, epoch: int, step: int) -> bool:
        """Record an update; returns whether there were too many bad ones in a row."""
        if not bad:
            self.in_a_row.clear()
            return False
        self.in_a_row.append((epoch, step))
        return len(self.in_a_row) >= self.allowed

    def error(self, images: Sequence[str], folder: Path, write: bool, left: str) -> DivergedError:
        """The error to raise; writes the names of the ``images`` to a file in ``folder``.

        Args:
            left: description of the remaining checkpoints.
        """
        path = folder / "bad_batches.txt"
        if write:
            write_text_atomically(path, "".join(f"{name}\n" for name in images))
        first = ", ".join(images[:3])
        return DivergedError(
            f"the loss was not finite in {len(self.in_a_row)} updates in a row; their "
            f"{len(images)} images ({first}, …) are listed in {path}; {left}. A lower lr or "
            "clip_grad may help"
        )
