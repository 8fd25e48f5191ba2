"""HAT's ONNX export: thousands of nodes, whose equal tables are stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import backbones
from backbones.cli import graphs

TINY: dict[str, Any] = {"dim": 24, "window_size": 4, "compress_ratio": 3, "squeeze_factor": 8}


def tiny(groups: int, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"depths": (2,) * groups, "num_heads": (2,) * groups, **TINY, **kwargs}
    return backbones.create_model("hat_s_x2", **arguments).eval()


def test_equal_tables_are_stored_once(tmp_path: Path) -> None:
    """Every block of a group has the same positions, of 16 × 16 and 16 × 36 places."""
    model, path = tiny(1), tmp_path / "m.onnx"
    graphs.save_onnx(graphs.trace(model, (1, 3, 4, 8), dynamic=False), path)
    (found,) = graphs.check(model, graphs.onnx_runner(path), [(1, 3, 4, 8)])
    assert found.error < 1e-5
    constants = [t.raw_data for t in onnx.load(path).graph.initializer if len(t.raw_data) > 2000]
    assert constants and len(set(constants)) == len(constants)


@pytest.mark.slow
def test_dynamic_sizes_down_to_one_pixel(tmp_path):
    model, path = tiny(2), tmp_path / "m.onnx"
    graphs.save_onnx(graphs.trace(model, (1, 3, 16, 16), dynamic=True), path)
    shapes = [(1, 3, 1, 1), (2, 3, 4, 5), (1, 3, 13, 4), (3, 3, 9, 14)]
    for found in graphs.check(model, graphs.onnx_runner(path), shapes):
        assert found.error < 1e-5, found.shape
