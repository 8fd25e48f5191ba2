"""How much memory networks take, without running them."""

from __future__ import annotations

import sys

import pytest
import torch

from backbones.common.memory import available_memory, measure_memory


def test_what_is_kept_of_a_shape_grows_with_the_convolutions():
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    networks = torch.nn.GELU(), conv, torch.nn.Sequential(conv, torch.nn.GELU(), conv)
    none, once, twice = (measure_memory(n, torch.zeros(1, 3, 32, 32))[1] for n in networks)
    assert none == 0 and twice - once == conv.weight.nbytes < once  # the layout's code is shared


def test_unknown_free_memory(monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_text", lambda *args: (_ for _ in ()).throw(OSError))
    assert available_memory(torch.device("cpu")) == 4 * 2**30
    assert available_memory(torch.device("cpu"), unknown=sys.maxsize) == sys.maxsize


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 4096), ("5000000", 4096), ("3000", 1000), ("100", 0)]
)
def test_free_memory_within_the_control_group(limit, free, monkeypatch):
    texts = {"memory.max": f"{limit}\n", "memory.current": "2000\n"}
    texts["meminfo"] = "MemTotal: 9 kB\nMemAvailable:   4 kB\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: texts[path.name])
    assert available_memory(torch.device("cpu")) == free
