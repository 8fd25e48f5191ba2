"""Published initial values, epsilons of norms, and exemptions from weight decay."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import SMALL

import backbones


class Std(NamedTuple):
    """A standard deviation, of values around zero."""

    value: float


NORMAL = Std(0.02)


def normal(layer: Any) -> Std:
    return NORMAL


def torchs(layer: Any) -> Std:
    """PyTorch's own: uniform within ±fan_in^-0.5."""
    return Std((3 * layer.weight[0].numel()) ** -0.5)


def fan_out(conv: Any) -> Std:
    return Std((2 * conv.groups / (conv.out_channels * math.prod(conv.kernel_size))) ** 0.5)


def kaiming(conv: Any) -> Std:
    """By the fan-out, that of depthwise convolutions as if they had one group."""
    return Std((2 / (conv.out_channels * math.prod(conv.kernel_size))) ** 0.5)


def xavier(layer: Any) -> Std:
    fans = layer.weight[0].numel() + layer.weight[:, 0].numel()
    return Std((2 / fans) ** 0.5 * 2**-2.5)


class Values(NamedTuple):
    """What a variant's parameters are before training.

    Attributes:
        conv, linear: rules of the weights; biases are zero but for PyTorch's own.
        others: values of parameters whose names match, before those rules; None for any.
        eps: of the layer norms whose names match; the first pattern counts.
        spared: pattern of the matrices without weight decay.
        arguments: of the variant.
    """

    conv: Any
    linear: Any = normal
    others: dict[str, Any] = {}
    eps: dict[str, float] = {"": 1e-5}
    spared: str = "^$"
    arguments: dict[str, Any] = {}


_SHALLOW = {"depths": (1, 1, 1, 1)}
_SMALL_EPS = {"": 1e-6}
_RPB: dict[str, Any] = {r"\.rpb$": NORMAL}
_SILENT = {r"(conv[12]?\.fn|fc2|proj)\.norm\.weight$": 0.0}
VALUES = {
    "biformer_tiny": Values(torchs, eps=_SMALL_EPS, arguments=_SHALLOW),
    "biformer_stl": Values(torchs, eps=_SMALL_EPS, arguments=_SHALLOW),
    "biformer_stl_nchw": Values(
        *(torchs, torchs, {r"head\.fc\.weight": NORMAL, r"head\.fc\.bias": 0.0}, _SMALL_EPS),
        arguments=_SHALLOW,
    ),
    "dinat_s_tiny": Values(torchs, others=_RPB),
    "eca_resnet50": Values(kaiming, torchs, {r"\.eca\.": None}),
    "eca_mobilenet_v2": Values(kaiming, torchs, {r"\.eca\.": None}),
    "efficientvit_m0": Values(
        torchs, others={**_SILENT, "attention_biases": 0.0}, spared="attention_biases"
    ),
    "favit_b1": Values(fan_out, eps={"stem|downsample|global_branch": 1e-5, "": 1e-6}),
    "hat_x2": Values(
        torchs,
        others={"bias_table": NORMAL},
        spared="bias_table",
        arguments={"depths": (2,), "num_heads": (6,)},
    ),
    "inception_next_tiny": Values(normal, others={r"\.gamma$": 1e-6}, eps=_SMALL_EPS),
    "litv2_s": Values(
        torchs,
        others={r"mlp\.dwconv\.weight": fan_out, r"mlp\.dwconv\.bias": 0.0, r"\.offset\.": 0.0},
        arguments=_SHALLOW,
    ),
    "medvitv2_tiny": Values(normal, others={**_RPB, r"\.grid$": None}),
    "nat_mini": Values(torchs, others={**_RPB, r"\.gamma$": 0.5}, arguments=SMALL["nat"][1]),
    "dinat_isotropic_small": Values(torchs, others=_RPB),
    "overlock_xt": Values(
        normal,
        others={
            **{r"\.(rpb[12]|gamma|beta|tap_bias)$": 0.0, "tap_weight": NORMAL},
            r"(\.ls[12]?|_scale)\.weight$": 1.0,
            r"(\.ls[12]?|_scale)\.bias$": 0.0,
        },
        eps=_SMALL_EPS,
    ),
    "proxyless_cpu": Values(torchs, torchs),
    "ravlt_t": Values(normal, others={"gamma": 1.0}, eps=_SMALL_EPS, arguments=_SHALLOW),
    "ravlt_b": Values(
        normal,
        others={r"stages\.[01].*gamma": 1.0, "gamma": 1e-6},
        eps=_SMALL_EPS,
        arguments=_SHALLOW,
    ),
    "ravlt_l": Values(normal, others={"gamma": 1e-6}, eps=_SMALL_EPS, arguments=_SHALLOW),
    "shvit_s1": Values(torchs, others=_SILENT),
    "unireplknet_a": Values(
        normal,
        others={r"\.gamma$": 1e-6, r"\.grn\.": 0.0, r"head\.fc\.weight": Std(0.01)},
        eps=_SMALL_EPS,
        arguments={"head_init_scale": 0.5},
    ),
    "van_b1": Values(fan_out, others={r"\.gamma$": 0.01}, eps=_SMALL_EPS),
    "vig_t": Values(
        torchs,
        others={r"attn\.(qkv|decay_\w+|gate|proj|dwconv)\.weight": xavier, "pos_embed": NORMAL},
    ),
    "vig_h_t": Values(torchs, others={r"attn\.dwconv\.": xavier}),
    "vmamba_tiny_s1l8": Values(
        torchs,
        others={
            **{r"x_proj\.weight": torchs, r"\.D$": 1.0, "delta_bias|A_log": None},
            "delta_weight": lambda scan: Std((3 * scan.delta_weight.shape[1]) ** -0.5),
        },
    ),
    "vrwkv_t": Values(torchs, others={"pos_embed": 0.0, "decay|first|mix": None}),
}


def _wanted(name: str, module: nn.Module, values: Values) -> Any:
    for pattern, value in values.others.items():
        if re.search(pattern, name):
            return value(module) if callable(value) else value
    if "Norm" in type(module).__name__:
        return 1.0 if name.endswith(".weight") else 0.0
    assert isinstance(module, nn.Conv2d | nn.Linear), name
    rule = values.conv if isinstance(module, nn.Conv2d) else values.linear
    if name.endswith(".weight"):
        return rule(module)
    return None if rule is torchs else 0.0


@pytest.mark.parametrize("variant", VALUES)
def test_values_before_training(variant):
    values = VALUES[variant]
    torch.manual_seed(0)
    model = backbones.create_model(variant, **values.arguments)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            wanted = _wanted(name, module, values)
            if isinstance(wanted, Std):
                within = 4 * parameter.numel() ** -0.5 + 0.005
                found = parameter.std().item()
                assert found == pytest.approx(wanted.value, rel=within), name
            elif wanted is not None:
                assert (parameter == torch.tensor(wanted)).all(), name
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            assert module.eps == next(e for p, e in values.eps.items() if re.search(p, path)), path
        elif isinstance(module, _BatchNorm):
            assert module.eps == (1e-3 if variant.startswith("proxyless") else 1e-5), path
    names = [name for name, _ in model.named_parameters()]
    assert model.no_weight_decay() == {name for name in names if re.search(values.spared, name)}
