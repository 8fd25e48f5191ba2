"""A checkpoint and photographs, which tests embed."""

from __future__ import annotations

from pathlib import Path

import pytest
from embedding_runs import make_photos, tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten."""
    return make_photos(tmp_path / "photos", 10)
