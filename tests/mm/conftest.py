"""OpenMMLab's packages, imported once: their imports warn about PyTorch's newer versions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import backbones.openmmlab  # noqa: F401

    # isort: split
    # Only now: these need what the adapter puts in place of mmcv's operators.
    import mmdet.apis  # noqa: F401
    import mmseg.apis  # noqa: F401

HERE = Path(__file__).parent
# Their code's own warnings are theirs; ours stay errors.
THEIRS = (
    "ignore:::mmengine",
    "ignore:::mmcv",
    "ignore:::mmdet",
    "ignore:::mmseg",
    "ignore:::torch",
    "ignore:::pycocotools",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
    # mmengine leaves its log files open.
    "ignore::ResourceWarning",
)


@pytest.fixture(scope="session", autouse=True)
def configs_as_written() -> Iterator[None]:
    """A run logs and keeps its config, which mmengine takes a second to lay out."""
    with pytest.MonkeyPatch.context() as patch:
        # Which the maintained fork of mmengine does not have.
        name = "mmengine.config.config.FormatCode"
        patch.setattr(name, lambda text, **_: (text, True), raising=False)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            for rule in THEIRS:
                item.add_marker(pytest.mark.filterwarnings(rule))
