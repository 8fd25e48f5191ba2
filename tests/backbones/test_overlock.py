"""OverLoCK: both forms of its checkpoints, its dense networks, and its parts."""

from __future__ import annotations

import re
import zlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import SMALL, images, outlines, randomise, small

import backbones
from backbones.cli.parity import (
    checkpoint,
    image,
    reference,
    relative_error,
    summary_error,
    tolerance,
)
from backbones.core.registry import published_weights
from backbones.overlock_blocks import ContextMixing, position_bias

TOLERANCE = tolerance("overlock")
VARIANTS = ("overlock_xt", "overlock_t", "overlock_s", "overlock_b")
QUICK = "overlock_xt"
every_variant = pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v == QUICK else pytest.mark.slow) for v in VARIANTS]
)
Row = list[Any]


def merged_rows(figures: dict[str, Any]) -> list[Row]:
    """Those of the published merged form."""
    rows: list[Row] = []
    for row in figures["state_dict"]:
        if re.search(figures["deploy"]["drop"], row[0]):
            continue
        rows.append(row)
        if row[0].endswith(".lk_origin.weight"):
            rows.append([row[0].replace(".weight", ".bias"), row[1][:1], row[2]])
    names = "\n".join(name for name, _, _ in rows)
    assert zlib.crc32(names.encode()) == figures["deploy"]["rows_crc32"]
    return rows


def merged_by_the_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published merging, from its names to its names."""
    merged = dict(tensors)
    for name in [n for n in tensors if n.endswith(".lk_origin.weight")]:
        block = name.removesuffix("lk_origin.weight")
        kernel, bias = torch.zeros_like(tensors[name]), torch.zeros(len(tensors[name]))
        for conv in [n for n in tensors if n.startswith(block) and n.endswith(".weight")]:
            weight = tensors[conv]
            if weight.ndim == 1:
                continue
            norm = conv.removesuffix("weight").replace("lk_origin", "origin_bn")
            norm = norm.replace("dil_conv", "dil_bn")
            scale = tensors[norm + "weight"] * (tensors[norm + "running_var"] + 1e-5).rsqrt()
            bias += tensors[norm + "bias"] - tensors[norm + "running_mean"] * scale
            dilation = int(conv.split("_")[-1].split(".")[0]) if "dil_conv" in conv else 1
            for i in range(weight.shape[2]):
                for j in range(weight.shape[3]):
                    y, x = (
                        kernel.shape[2] // 2 + dilation * (n - weight.shape[2] // 2) for n in (i, j)
                    )
                    kernel[:, :, y, x] += weight[:, :, i, j] * scale.view(-1, 1)
        merged |= {name: kernel, block + "lk_origin.bias": bias}
    gone = re.compile(r"\.(origin_bn|dil_conv_k\d+_\d+|dil_bn_k\d+_\d+)\.")
    return {name: tensor for name, tensor in merged.items() if not gone.search(name)}


@every_variant
@torch.no_grad()
def test_merged_checkpoints(variant: str) -> None:
    figures = reference("overlock", variant)
    tensors = checkpoint(figures, merged_rows(figures))
    model = backbones.create_model(variant).eval()
    report = backbones.load_checkpoint(model, tensors)
    assert not (report.missing or report.unexpected or report.reinitialised)
    for case in figures["deploy"]["cases"]:
        x = image(case["input"], case["seed"])
        logits = model(x)
        assert relative_error(logits.flatten()[:64], case["logits_first64"]) <= TOLERANCE
        assert summary_error(logits, case["logits_summary"]) <= TOLERANCE
    assert relative_error(model.fuse()(x), logits) <= TOLERANCE
    with pytest.raises(backbones.CheckpointError, match="before fuse"):
        backbones.load_checkpoint(model, tensors)


@every_variant
@torch.no_grad()
def test_merging(variant: str) -> None:
    """As the original does it, and with fuse()."""
    figures = reference("overlock", variant)
    tensors = checkpoint(figures)
    case = figures["cases"][0]
    x = image(case["input"], case["seed"])
    model = backbones.create_model(variant).eval()
    backbones.load_checkpoint(model, merged_by_the_original(tensors))
    assert relative_error(model(x), case["logits"]) <= TOLERANCE
    model = backbones.create_model(variant).eval()
    backbones.load_checkpoint(model, tensors)
    fused = model.fuse()
    assert relative_error(fused(x), case["logits"]) <= TOLERANCE
    # The published merging leaves the norms after the kernels.
    assert sum(p.numel() for p in fused.parameters()) < figures["deploy"]["params_without_aux"]


def test_a_merged_checkpoint_can_be_trained_further() -> None:
    """Merging's zeros stay, and the norm that follows makes up for the one that was folded."""
    torch.manual_seed(0)
    layer = randomise(small("overlock")).stages[0].blocks[0].lk
    weight, bias = (
        torch.randn(layer.conv.large.conv.weight.shape),
        torch.randn(len(layer.norm.bias)),
    )
    layer.conv.load_state_dict(layer.conv.unmerged(weight, bias), strict=False)
    x = images(2, len(bias), 9, 9)
    merged = F.conv2d(x, weight, bias, padding=8, groups=len(bias))
    torch.testing.assert_close(layer.conv.eval()(x), merged, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.train()(x), layer.norm(merged), rtol=1e-3, atol=1e-3)
    (layer(x) * images(*x.shape, seed=1)).sum().backward()
    for name, parameter in layer.conv.branches.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        if not name.endswith("norm.bias"):
            assert not parameter.any() and not parameter.grad.any(), name


@every_variant
@torch.no_grad()
def test_overview_and_auxiliary_head(variant: str) -> None:
    figures = reference("overlock", variant)
    model = backbones.create_model(variant).eval()
    backbones.load_checkpoint(model, checkpoint(figures))
    overview = model.stages[2].blocks[model.stages[2].base_depth]
    for case in figures["cases"]:
        seen: list[Tensor] = []
        hook = overview.register_forward_hook(lambda _, x, y, seen=seen: seen.extend((x[0], y[0])))
        logits = model(image(case["input"], case["seed"]))
        hook.remove()
        for value, expected in zip(seen, case["base_outputs"], strict=True):
            assert summary_error(value, expected) <= TOLERANCE
        if "aux_logits_first8" in case:
            aux = model.aux_head(seen[1]).flatten()[:8]
            assert relative_error(aux, case["aux_logits_first8"]) <= TOLERANCE
        assert isinstance(logits, Tensor)


def test_gradient_of_an_image() -> None:
    figures = reference("overlock", QUICK)
    case = figures["cases"][0]
    model = backbones.create_model(QUICK).eval()
    backbones.load_checkpoint(model, checkpoint(figures))
    x = image(case["input"], case["seed"]).requires_grad_()
    loss = model(x).square().mean()
    (gradient,) = torch.autograd.grad(loss, x)
    expected = case["grad"]
    assert abs(loss.item() / expected["loss"] - 1) <= TOLERANCE
    assert abs(gradient.norm().item() / expected["l2"] - 1) <= TOLERANCE
    assert relative_error(gradient.flatten()[:8], expected["first8"]) <= 2 * TOLERANCE


def dense_form(variant: str, detects: bool) -> tuple[Any, dict[str, Tensor]]:
    """Model and checkpoint of the paper's dense networks."""
    figures = reference("overlock", variant)
    rows = [r for r in figures["state_dict"] if not r[0].startswith(("head.", "aux_head."))]
    extra = [r for r in figures["dense_extra"] if detects or re.match(r"extra_norm\.[0-3]", r[0])]
    tensors = checkpoint(figures, rows) | checkpoint({"state_dict": extra})
    arguments: dict[str, Any] = {"overview_feature": True} if detects else {}
    model = backbones.create_model(variant, num_classes=0, out_norms=True, **arguments).eval()
    return model, tensors


@every_variant
@pytest.mark.parametrize("detects", [False, True])
@torch.no_grad()
def test_dense_checkpoints(variant: str, detects: bool) -> None:
    model, tensors = dense_form(variant, detects)
    wrapped = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    report = backbones.load_checkpoint(model, {"state_dict": wrapped})
    assert not (report.missing or report.unexpected or report.reinitialised)
    cases = reference("overlock", variant)["cases"]
    expected = [
        case["features"][:3] + [case["features_detection_last"]] if detects else case["features"]
        for case in cases
    ]

    def check(scale: float) -> None:
        for case, figures in zip(cases, expected, strict=True):
            x = image(case["input"], case["seed"])
            maps = model.forward_intermediates(x, intermediates_only=True)
            for value, each in zip(maps, figures, strict=True):
                assert summary_error(value, each) <= scale * TOLERANCE

    check(1)
    model.fuse()
    check(2)


@torch.no_grad()
def test_the_second_map_goes_on_normalised() -> None:
    x = images(1, 3, 64, 64)
    plain, dense = (randomise(small("overlock", out_norms=n)).eval() for n in (False, True))
    state = plain.state_dict()
    report = backbones.load_checkpoint(dense, state)
    parts = {name.rsplit(".", 1)[0] for name in report.reinitialised}
    assert parts == {"out_norms.0", "out_norms.2", "out_norms.3", "stages.1.norm"}
    raw = plain.forward_intermediates(x, intermediates_only=True)
    last, maps = dense.forward_intermediates(x)
    torch.testing.assert_close(maps[1], dense.stages[1].norm(raw[1]))
    torch.testing.assert_close(maps[2], dense.out_norms["2"](dense.stages[2](maps[1])[0]))
    assert relative_error(maps[2], dense.out_norms["2"](raw[2])) > 0.1
    # And so whichever maps are asked for, and in the classifier.
    torch.testing.assert_close(dense.forward_features(x), last)
    name, arguments = SMALL["overlock"]
    for taken in ((0, 3), (3,)):
        wrapper = backbones.create_model(
            name, features_only=True, out_indices=taken, out_norms=True, **arguments
        ).eval()
        backbones.load_checkpoint(wrapper, dense.state_dict())
        torch.testing.assert_close(wrapper(x)[-1], maps[3])
