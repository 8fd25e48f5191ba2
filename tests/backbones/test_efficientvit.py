"""EfficientViT: its dense and fused forms, and tables of other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from published import assert_maps, load_whole
from torch import Tensor, nn
from zoo import randomise

import backbones
from backbones.cli.parity import checkpoint, image, reference, relative_error, tolerance

VARIANTS = [
    pytest.param(f"efficientvit_m{i}", marks=() if i in (0, 5) else pytest.mark.slow)
    for i in range(6)
]
TOLERANCE = tolerance("efficientvit")
SMALL = "efficientvit_m0"


def dense_form(variant: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """Model, checkpoint and figures of the paper's detectors' backbone."""
    figures = reference("efficientvit", variant)
    dense = figures["dense"]
    replaced = {name: shape for name, shape, _ in figures["dense_extra"]}
    rows = [
        (name, replaced.get(name, shape), dtype)
        for name, shape, dtype in figures["state_dict"]
        if name not in dense["rows_missing"]
    ]
    tensors = checkpoint({"synth_scale": dense["synth_scale"]}, rows)
    model = backbones.create_model(
        variant, num_classes=0, img_size=448, kernel_sizes=dense["kernels"]
    )
    return model.eval(), tensors, dense


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_dense_checkpoints(variant):
    model, tensors, dense = dense_form(variant)
    assert sum(p.numel() for p in model.parameters()) == dense["params"]
    load_whole(model, tensors)
    cases = dense["cases"] if variant == SMALL else dense["cases"][:1]
    for case in cases:
        assert_maps(model, case, TOLERANCE)


def fused_by_the_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published fusing: norms go into their neighbours, identities stay outside."""
    fused = {}
    for name, tensor in tensors.items():
        place, part = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
        if part not in ("c", "bn", "l"):
            fused[name] = tensor
        elif part == "bn" and name.endswith(".weight"):
            scale = tensor * (tensors[f"{place}.bn.running_var"] + 1e-5).rsqrt()
            shift = tensors[f"{place}.bn.bias"] - tensors[f"{place}.bn.running_mean"] * scale
            if f"{place}.c.weight" in tensors:
                weight = tensors[f"{place}.c.weight"] * scale.view(-1, 1, 1, 1)
            else:
                weight = tensors[f"{place}.l.weight"] * scale
                shift = tensors[f"{place}.l.weight"] @ shift + tensors[f"{place}.l.bias"]
            fused |= {f"{place}.weight": weight, f"{place}.bias": shift}
    return fused


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_fused_checkpoints(variant):
    figures = reference("efficientvit", variant)
    tensors = fused_by_the_original(checkpoint(figures))
    rows = {
        name: shape for name, shape, kind in figures["fused"]["state_dict"] if "int" not in kind
    }
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == rows
    case = figures["cases"][0]
    x = image(case["input"], case["seed"])
    fresh, fused = (backbones.create_model(variant).eval() for _ in range(2))
    backbones.load_checkpoint(fresh, tensors)
    backbones.load_checkpoint(fused.fuse(), tensors)
    logits = fresh(x)
    assert relative_error(logits, case["logits"]) <= TOLERANCE
    assert torch.equal(fused(x), logits)


@torch.no_grad()
def test_timms_fused_checkpoint_loads():
    theirs = timm.utils.reparameterize_model(randomise(timm.create_model(SMALL)).eval())
    ours = backbones.create_model(SMALL).eval()
    backbones.load_checkpoint(ours, theirs.state_dict())
    x = image((1, 3, 224, 224))
    assert relative_error(ours(x), theirs(x)) <= TOLERANCE


@torch.no_grad()
def test_a_checkpoint_of_another_size_loads_with_its_tables_interpolated():
    figures = reference("efficientvit", SMALL)
    tensors = checkpoint(figures)
    model = backbones.create_model(SMALL, img_size=512).eval()
    report = backbones.load_checkpoint(model, tensors)
    names = [f"stages.2.blocks.{i}.attn.fn.attention_biases" for i in range(3)]
    assert report.resized == names
    own = model.state_dict()
    for i, name in enumerate(names):
        table = tensors[f"blocks3.{i + 3}.mixer.m.attn.attention_biases"].view(1, 4, 4, 4)
        expected = nn.functional.interpolate(table, size=(7, 7), mode="bicubic")
        torch.testing.assert_close(own[name].view(1, 4, 7, 7), expected)
    # The same interpolation happens in a model that was built for 224 and runs at 512.
    built_for_224 = backbones.create_model(SMALL).eval()
    backbones.load_checkpoint(built_for_224, tensors)
    x = image((1, 3, 512, 448))
    torch.testing.assert_close(model(x), built_for_224(x), rtol=1e-4, atol=1e-4)


def test_tables_of_other_heads_are_refused():
    state = backbones.create_model(SMALL).state_dict()
    name = "stages.2.blocks.0.attn.fn.attention_biases"
    state[name] = torch.zeros(3, 49)
    with pytest.raises(backbones.CheckpointError, match="attention_biases"):
        backbones.load_checkpoint(backbones.create_model(SMALL), state)


@torch.no_grad()
def test_loading_after_eval_uses_the_new_biases():
    figures = reference("efficientvit", SMALL)
    model = backbones.create_model(SMALL).eval()
    case = figures["cases"][0]
    x = image(case["input"], case["seed"])
    model(x)
    backbones.load_checkpoint(model, checkpoint(figures))
    assert relative_error(model(x), case["logits"]) <= TOLERANCE
    model.fuse()(x)
    model.load_state_dict(
        {k: v * 0 if k.endswith("attention_biases") else v for k, v in model.state_dict().items()}
    )
    assert relative_error(model(x), case["logits"]) > 1e-3
