"""The model behind the commands."""

from __future__ import annotations

import argparse
import re

import pytest
import torch
from safetensors.torch import save_file

import backbones
from backbones.common.errors import CommandError
from backbones.restoration.restorer import add_model_arguments, restorer_of
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8


@pytest.fixture
def nano(tmp_path):
    """A model, and a function that makes its restorer from further words of a command."""
    plain = backbones.create_model("hat_nano_x2").eval()
    save_file(plain.state_dict(), tmp_path / "nano.safetensors")
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    words = ["--model", "hat_nano_x2", "--checkpoint", str(tmp_path / "nano.safetensors")]
    words += ["--device", "cpu"]
    return plain, lambda *more: restorer_of(parser.parse_args([*words, *more]))


@pytest.mark.parametrize("amp", [False, True])
@torch.inference_mode()
def test_it_is_fused_on_a_cpu_unless_it_runs_in_two_dtypes(nano, amp):
    plain, restorer = nano
    model, memory = restorer(*(["--amp"] if amp else []))
    assert model.fused is not amp and memory is None
    x = torch.rand(1, 3, 20, 27)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_dtypes(nano, monkeypatch):
    """Of a CPU that has instructions for them, without autocast."""
    monkeypatch.setattr(policy, "_FEWEST_IN_INT8_OF_TILES", 1)  # all layers are small
    plain, restorer = nano
    with pytest.raises(CommandError, match="--dtype is for CPUs, without --amp"):
        restorer("--dtype", "int8", "--amp")
    reason = not_faster_in_int8(torch.device("cpu"))
    if reason is not None:
        with pytest.raises(CommandError, match=f"--dtype int8: {re.escape(reason)}"):
            restorer("--dtype", "int8")
        return
    model, _ = restorer("--dtype", "int8")
    assert model.precision.quantized
    x = torch.rand(1, 3, 20, 27)
    error = (model(x.to(next(model.parameters()).dtype)) - plain(x)).abs().mean()
    assert error < 0.01
