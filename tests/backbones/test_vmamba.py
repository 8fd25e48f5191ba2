"""VMamba beyond the contract: names of files, dense copies, the recurrence, first values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import small

import backbones
from backbones.cli.parity import checkpoint, reference
from backbones.vmamba import SelectiveScan2d

VANILLA: dict[str, Any] = {"vanilla": True, "num_states": 3, "scan_ratio": 2}


def todays_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A vanilla file with the names of the current class."""
    pairs = (
        *((r"^patch_embed\.proj", "patch_embed.0"), (r"^patch_embed\.norm", "patch_embed.2")),
        *((r"\.ln_1\.", ".norm."), (r"\.self_attention\.", ".op.")),
        *((r"^norm\.", "classifier.norm."), (r"^head\.", "classifier.head.")),
    )
    renamed = {}
    for name, tensor in weights.items():
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        renamed[name] = tensor
    return renamed


def single_file(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of the four orders in one, and matrices as convolutions."""
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            renamed[name.replace("_weight", ".weight")] = tensor.flatten(0, 1)
        else:
            is_matrix = re.search(r"(in_proj|out_proj|fc[12])\.weight$", name)
            renamed[name] = tensor[:, :, None, None] if is_matrix else tensor
    return renamed


@pytest.mark.parametrize(
    ("name", "change"), [("vanilla_vmamba_tiny", todays_names), ("vmamba_tiny_s2l5", single_file)]
)
def test_other_names(name, change):
    weights = checkpoint(reference("vmamba", name))
    other = change(weights)
    assert other.keys() != weights.keys()
    models = [backbones.create_model(name) for _ in range(2)]
    for model, names in zip(models, (weights, other), strict=True):
        report = backbones.load_checkpoint(model, {"model": names, "model_ema": names})
        assert not (report.missing or report.unexpected or report.resized or report.reinitialised)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_the_layer_is_the_published_recurrence(gated):
    """Pixel by pixel, in four orders; the norm hides what is common to all channels."""
    torch.manual_seed(0)
    layer = SelectiveScan2d(20, 6, 3, gated).double().eval()
    layer.init_weights()
    layer.norm = nn.Identity()
    x = torch.randn(2, 3, 4, 20, dtype=torch.float64)
    hidden, gate = (*layer.in_proj(x).split(6, -1), None)[:2]
    hidden = F.silu(layer.dwconv(hidden.movedim(3, 1))).movedim(1, 3)
    decays, total = -layer.A_log.exp(), torch.zeros_like(hidden)
    places = [(i, j) for i in range(3) for j in range(4)]
    by_column = sorted(places, key=lambda place: place[::-1])
    orders = (places, by_column, places[::-1], by_column[::-1])
    for k, order in enumerate(orders):
        of_order = slice(6 * k, 6 * k + 6)
        state = torch.zeros(2, 6, 3, dtype=torch.float64)
        for i, j in order:
            u = hidden[:, i, j]
            projected = u @ layer.x_proj.weight.unflatten(0, (4, -1))[k].mT
            steps, before, after = projected.split([2, 3, 3], -1)
            step = F.softplus(steps @ layer.delta_weight[k] + layer.delta_bias[k])[..., None]
            state = state * (step * decays[of_order]).exp() + step * u[..., None] * before[:, None]
            total[:, i, j] += (state * after[:, None]).sum(-1) + layer.D[of_order] * u
    expected = layer.proj(total if gate is None else total * F.silu(gate))
    torch.testing.assert_close(layer(x), expected)


def test_initial_weights():
    for kwargs in ({}, VANILLA):
        for scan in (
            m for m in small("vmamba", **kwargs).modules() if isinstance(m, SelectiveScan2d)
        ):
            states = scan.A_log.shape[1]
            wanted = -torch.arange(1.0, states + 1).expand(scan.A_log.shape)
            torch.testing.assert_close(scan.decays(), wanted)
            steps = F.softplus(scan.delta_bias)
            assert 1e-3 * 0.999 <= steps.min() <= 2e-3 and 0.05 <= steps.max() <= 0.1001
            assert (scan.D == 1).all()
            held = scan.bfloat16().A_log.float()
            assert torch.equal(scan.decays(), -held.exp())
