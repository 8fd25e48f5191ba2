"""The model behind the commands."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import backbones
from backbones.restoration.restorer import add_model_arguments, restorer_of


@pytest.mark.parametrize("amp", [False, True])
def test_it_is_fused_on_a_cpu_unless_it_runs_in_two_dtypes(tmp_path: Path, amp: bool) -> None:
    plain = backbones.create_model("hat_nano_x2").eval()
    save_file(plain.state_dict(), tmp_path / "nano.safetensors")
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    arguments = ["--model", "hat_nano_x2", "--checkpoint", str(tmp_path / "nano.safetensors")]
    arguments += ["--device", "cpu", *(["--amp"] if amp else [])]
    model, memory = restorer_of(parser.parse_args(arguments))
    assert model.fused is not amp and memory is None
    x = torch.rand(1, 3, 20, 27)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
