"""How much memory networks take, without running them."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from zoo import small

from backbones.cli.common import two_sides
from backbones.cli.main import CommandError
from backbones.common.memory import available_memory, live_bytes, measure_memory, peak_bytes


@pytest.mark.parametrize("family", ["van", "litv2", "medvitv2"])
def test_the_peak_equals_the_measured_peak(family):
    model = small(family).eval()
    images = torch.zeros(2, 3, 96, 64)
    with torch.inference_mode():
        measured = live_bytes(model, images)
    # The images themselves were there before.
    assert peak_bytes(model, (2, 3, 96, 64)) == pytest.approx(measured, abs=2 * images.nbytes)


def test_what_is_kept_of_a_shape_grows_with_the_convolutions():
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    networks = torch.nn.GELU(), conv, torch.nn.Sequential(conv, torch.nn.GELU(), conv)
    none, once, twice = (measure_memory(n, torch.zeros(1, 3, 32, 32))[1] for n in networks)
    assert none == 0 and twice - once == conv.weight.nbytes < once  # the layout's code is shared


def test_sizes_beyond_the_address_space():
    assert peak_bytes(small("shvit").eval(), (1, 3, 10**9, 10**9)) == math.inf


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


@pytest.mark.parametrize("family", ["van", "ravlt", "hat"])
def test_sizes_beyond_memory(family, monkeypatch):
    """A system that grants more than it has would end the process later, without a word."""
    monkeypatch.setattr("backbones.common.memory.available_memory", lambda *a, **k: 2**30)
    model = small(family).eval()
    with pytest.raises(CommandError, match=r"65535×65535 need more than .* only 1\.07 GB are free"):
        two_sides([65535], model)
    assert two_sides([65535], model, runs=False) == (65535, 65535)
    assert two_sides([512], model) == (512, 512)
    with pytest.raises(CommandError, match=r"images of 100000×\d×512×512 need more than .* GB"):
        two_sides([512, 512], model, batch=100_000)
