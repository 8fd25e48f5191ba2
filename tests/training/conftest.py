"""Trainings in a test's own folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import Runs


@pytest.fixture
def runs(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    """With the images of the test's module."""
    return Runs(tmp_path, capsys, f"--data={images}")
