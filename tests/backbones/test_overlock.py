"""OverLoCK: both forms of its checkpoints, its dense networks, and its parts."""

from __future__ import annotations

import re
import zlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import load_published
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from zoo import SMALL, images, randomise, small

import backbones
from backbones.cli.parity import (
    checkpoint,
    image,
    reference,
    relative_error,
    summary_error,
    tolerance,
)
from backbones.overlock.blocks import ContextMixing, window_offsets

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


@every_variant
@torch.no_grad()
def test_merged_checkpoints(variant):
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


def test_a_merged_checkpoint_can_be_trained_further():
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
def test_overview_and_auxiliary_head(variant):
    model, figures = load_published("overlock", variant)
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


@torch.no_grad()
def test_the_second_map_goes_on_normalised():
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


def naive_mixing(layer: Any, value: Tensor, x: Tensor, context: Tensor) -> Tensor:
    """A position at a time, before the projection."""
    heads, (height, width) = layer.num_heads, value.shape[2:]
    query = layer.query(x)[0].unflatten(0, (heads, -1))
    key = layer.key(F.adaptive_avg_pool2d(context, 7))[0].flatten(1).unflatten(0, (heads, -1))
    out = torch.zeros_like(value[0]).unflatten(0, (2, heads, -1))
    values = value[0].unflatten(0, (2, heads, -1))
    for half, (k, table) in enumerate(
        zip(layer.kernel_sizes, (layer.rpb1, layer.rpb2), strict=True)
    ):
        for head in range(heads):
            for i in range(height):
                for j in range(width):
                    affinity = query[head, :, i, j] @ key[head] * layer.scale
                    every = layer.tap_weight @ affinity + layer.tap_bias
                    taps = every[25 * half :][: k * k].view(k, k).clone()
                    top = min(max(i - k // 2, 0), height - k)
                    left = min(max(j - k // 2, 0), width - k)
                    for p in range(k):
                        for q in range(k):
                            taps[p, q] += table[head, top + p - i + k - 1, left + q - j + k - 1]
                    window = values[half, head, :, top : top + k, left : left + k]
                    share = taps.flatten().softmax(0).view(k, k)
                    out[half, head, :, i, j] = (window * share).sum((1, 2))
    return out.flatten(0, 2)[None]


def mixing(kernel_size: int = 7) -> ContextMixing:
    torch.manual_seed(0)
    layer = randomise(ContextMixing(16, 6, 2, kernel_size)).double().eval()
    assert isinstance(layer, ContextMixing)
    return layer


@pytest.mark.parametrize("size", [(7, 7), (8, 11)])
@torch.no_grad()
def test_context_mixing(size):
    layer = mixing()
    value, x, context = (images(1, c, *size, seed=c).double() for c in (16, 16, 6))
    expected = layer.proj(naive_mixing(layer, value, x, context))
    offsets = window_offsets(size, 7, x.device)
    torch.testing.assert_close(layer(value, x, context, offsets), expected)


@pytest.mark.parametrize(
    ("size", "larger"),
    [((3, 27), (13, 116)), ((27, 3), (116, 13)), ((7, 7), (13, 13)), ((1, 1), (13, 13))],
)
@torch.no_grad()
def test_maps_below_the_kernel_are_enlarged(size, larger):
    """To sides that the original computes in floating point: 116, not 117."""
    layer = mixing(13)
    given = [images(1, c, *size, seed=c).double() for c in (16, 16, 6)]
    value, x, context = (F.interpolate(t, size=larger, mode="bilinear") for t in given)
    seen: list[Tensor] = []
    layer.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    offsets = window_offsets(size, 13, x.device)
    layer(value, x, context, offsets)
    layer(*given, offsets)
    torch.testing.assert_close(seen[1], F.adaptive_avg_pool2d(seen[0], size))


def test_initial_scales():
    dense = small("overlock", overview_feature=True, layer_scale=0.5)
    assert (dense.overview_feature.scale.weight == 1e-5).all()
    assert (dense.stages[3].blocks[0].ls1.weight == 0.5).all()
    assert isinstance(dense.stages[1].blocks[0].ls, nn.Identity)


def test_layers_of_the_learning_rate_decay_are_in_order():
    model = small("overlock")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    order = ["stem.0", "stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0"]
    overview = model.stages[2].base_depth
    order += [f"stages.2.blocks.{i}" for i in range(overview, overview + 3)]
    order += ["stages.3.blocks.0", "head"]
    rates = [{scale[id(p)] for p in model.get_submodule(part).parameters()} for part in order]
    assert all(len(each) == 1 for each in rates)
    assert sorted(rates, key=min) == rates and len({min(each) for each in rates}) == len(rates)


def test_the_auxiliary_head_is_optional():
    x = images(2, 3, 64, 64)
    model = small("overlock", num_classes=3)
    logits, auxiliary = model(x)
    assert logits.shape == auxiliary.shape == (2, 3)
    assert isinstance(model.eval()(x), Tensor)
    model.reset_classifier(5)
    assert [out.shape for out in model.train()(x)] == [(2, 5)] * 2
    assert small("overlock", num_classes=3, aux_head=False)(x).shape == (2, 3)
    assert small("overlock", num_classes=0)(x).ndim == 2
    model.reset_classifier(0)
    assert isinstance(model(x), Tensor)


def test_checkpoints_with_and_without_the_auxiliary_head():
    state = small("overlock").state_dict()
    without = {name: t for name, t in state.items() if not name.startswith("aux_head.")}
    report = backbones.load_checkpoint(small("overlock"), without)
    assert {name.split(".")[0] for name in report.reinitialised} == {"aux_head"}
    report = backbones.load_checkpoint(small("overlock", aux_head=False), state)
    assert not report.unexpected and {n.split(".")[0] for n in report.ignored} == {"aux_head"}
    other = small("overlock", num_classes=7)
    report = backbones.load_checkpoint(other, state)
    heads = {f"{head}.fc.{part}" for head in ("head", "aux_head") for part in ("weight", "bias")}
    assert set(report.reinitialised) == heads
    assert not any(n.startswith("aux_head") for n in small("overlock").eval().fuse().state_dict())
