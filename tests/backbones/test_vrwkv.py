"""Vision-RWKV: the published kernel and the paper's formula, gradients, checkpoints, sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from published import load_published
from zoo import images, outlines, randomise, small

import backbones
from backbones.cli.parity import image, reference, relative_error
from backbones.vrwkv import blocks
from backbones.vrwkv.blocks import Block, WKVAttention, shift

VARIANTS = ("vrwkv_t", "vrwkv_s", "vrwkv_b", "vrwkv_l")
OTHER_FORMS = [
    pytest.param(variant, form, segments, marks=() if variant == "vrwkv_t" else pytest.mark.slow)
    for variant in VARIANTS
    for form, segments in (("logits_formula", 0), ("logits_segments32", 32))
    if form in reference("vrwkv", variant)["cases"][0]
]


@pytest.mark.parametrize(("variant", "form", "segments"), OTHER_FORMS)
@torch.no_grad()
def test_other_forms_of_the_scan(variant, form, segments):
    model, figures = load_published("vrwkv", variant, segments=segments)
    for case in figures["cases"]:
        logits = model(image(case["input"], case["seed"]))
        tolerance = 3e-5 if variant == "vrwkv_l" else 1e-5
        assert relative_error(logits, case[form]) <= tolerance


@pytest.mark.parametrize("variant", ["vrwkv_t", "vrwkv6_t"])
def test_the_gradient_of_the_image_against_float64(variant, monkeypatch):
    """Through the published weights, in the closed forms of both scans, or what trains."""
    x = image((2, 3, 96, 128), 2)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        model = load_published("vrwkv", variant)[0].to(dtype)
        taken = x.to(dtype).requires_grad_()
        with monkeypatch.context() as patch:
            if dtype == torch.float64:
                for name in ("bi_wkv", "gated_linear_attention"):
                    scan = getattr(blocks, name)
                    patch.setattr(blocks, name, partial(scan, backend="reference"))
            model(taken).square().mean().backward()
        gradients.append(taken.grad)
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


def test_segments_by_default():
    with outlines():
        models = {name: backbones.create_model(name) for name in VARIANTS}
        formula = backbones.create_model("vrwkv_t", segments=0)
    for name, model in models.items():
        segments = {m.segments for m in model.modules() if isinstance(m, WKVAttention)}
        assert segments == {16 if name == "vrwkv_l" else 32}
    assert formula.stages[0].blocks[0].attn.segments == 0


def test_shift():
    x = torch.arange(2 * 3 * 8.0).view(1, 2, 3, 8)
    shifted = shift(x)
    assert torch.equal(shifted[0, :, 1:, :2], x[0, :, :-1, :2])  # left neighbours
    assert torch.equal(shifted[0, :, :-1, 2:4], x[0, :, 1:, 2:4])  # right
    assert torch.equal(shifted[0, 1:, :, 4:6], x[0, :-1, :, 4:6])  # upper
    assert torch.equal(shifted[0, :-1, :, 6:], x[0, 1:, :, 6:])  # lower
    for border in (shifted[0, :, 0, :2], shifted[0, :, -1, 2:4]):
        assert not border.any()
    assert not shifted[0, 0, :, 4:6].any() and not shifted[0, -1, :, 6:].any()
    in_heads = torch.cat([shift(x[..., :4]), shift(x[..., 4:])], -1)
    assert torch.equal(shift(x, 2), in_heads)
    assert not shift(x[:, :1, :1]).any()


@pytest.mark.parametrize("kwargs", [{}, {"gated": True}], ids=["vrwkv", "vrwkv6"])
@torch.no_grad()
def test_images_are_padded_with_zeros(kwargs):
    model = randomise(small("vrwkv", **kwargs)).eval()
    x = images(1, 3, 50, 33)
    padded = torch.nn.functional.pad(x, (0, 15, 0, 14))
    torch.testing.assert_close(model(x), model(padded))


def test_published_first_values():
    model = backbones.create_model("vrwkv_t")
    blocks = [block for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(blocks[-1].mlp.mix_k[0, 0, 96].data, torch.tensor(0.5 ** (1 / 12)))
    first, last = blocks[0].attn, blocks[-1].attn
    channel = torch.arange(192) / 191
    torch.testing.assert_close(first.decay.data, -5 + 8 * channel**0.7)
    torch.testing.assert_close(last.decay.data, -5 + 8 * channel**2)
    torch.testing.assert_close(first.first.data[:3], torch.tensor([0.3, 0.8, -0.2]))
    torch.testing.assert_close(first.mix_r.data[0, 0, 48], torch.tensor(0.5))
    torch.testing.assert_close(last.mix_v.data[0, 0, 0], torch.tensor(0.3))
    assert not model.stem.position.pos_embed.any()
    sixth = backbones.create_model("vrwkv6_t").stages[0].blocks[0].attn
    torch.testing.assert_close(sixth.decay.data[0, 0, [0, -1]], torch.tensor([-6.0, -1.0]))
    assert sixth.mix_up.abs().max() <= 1e-4


def test_post_norm_and_scales():
    block = small("vrwkv", post_norm=True, layer_scale=2, key_norm=True).stages[0].blocks[0]
    assert isinstance(block, Block)
    x = images(1, 4, 4, 64)
    expected = x + 2 * block.norm1(block.attn(x))
    torch.testing.assert_close(block(x), expected + 2 * block.norm2(block.mlp(expected)))


@torch.no_grad()
def test_a_hidden_layer_in_the_head():
    model = small("vrwkv", head_hidden_dim=24, num_classes=7).eval()
    x = images(2, 3, 32, 32)
    pooled = model.forward_features(x).mean((2, 3))
    hidden = model.head.pre_logits.fc(pooled).tanh()
    torch.testing.assert_close(model(x), model.head.fc(hidden))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), hidden)
    assert model.head_hidden_size == 24


@pytest.mark.parametrize("kwargs", [{}, {"gated": True}], ids=["plain", "gated"])
def test_all_calls_of_a_fused_model_are_ours(kwargs):
    """Also if it is fused again: at multiples of the patch size, nothing is padded or copied."""
    fused = randomise(small("vrwkv", **kwargs)).eval().fuse()
    fused(images(1, 3, 32, 32))
    calls = backbones.explain(fused.fuse(), 224, repeats=1).calls
    assert {call.library for call in calls} == {"ours"}


@torch.no_grad()
def test_position_table_of_another_size():
    model = randomise(small("vrwkv", img_size=64)).eval()
    larger = small("vrwkv", img_size=96).eval()
    report = backbones.load_checkpoint(larger, model.state_dict())
    assert report.resized == ["stem.position.pos_embed"]
    x = images(1, 3, 96, 96)
    torch.testing.assert_close(larger(x), model(x))
