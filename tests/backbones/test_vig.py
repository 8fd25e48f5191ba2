"""ViG beyond the contract: both averages, networks of one resolution, dense maps, kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from published import assert_maps, load_published
from zoo import images, randomise

import backbones
from backbones.cli.parity import checkpoint, image, reference, relative_error, tolerance
from backbones.vig.blocks import GatedLinearAttention, JoinedAttention
from backbones.vig.inference import ViGAttention

SHALLOW: dict[str, dict[str, Any]] = {
    "vig_t": {"dim": 64, "num_heads": 2, "depths": (1, 1, 1, 1)},
    "vig_h_t": {"dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)},
}
each_kind = pytest.mark.parametrize("name", SHALLOW)


def shallow(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomise(backbones.create_model(name, **{**SHALLOW[name], **kwargs}))


@pytest.mark.parametrize(
    ("variant", "number"),
    [("vig_t", 0), *(pytest.param(f"vig_{v}", 1, marks=pytest.mark.slow) for v in "tsb")],
)
@torch.no_grad()
def test_mean_of_directions(variant, number):
    """As training computes it; the published evaluation halves it once more."""
    model, figures = load_published("vig", variant, mean_of_directions=True, drop_path_rate=0.0)
    case = figures["cases"][number]
    x = image(case["input"], case["seed"])
    assert relative_error(model(x), case["logits_mean_of_directions"]) <= 1e-5
    assert relative_error(model(x), case["logits"]) > 1e-3
    published = backbones.create_model(variant, drop_path_rate=0.0)
    backbones.load_checkpoint(published, checkpoint(figures))
    assert relative_error(published.train()(x), case["logits_mean_of_directions"]) <= 1e-5


@torch.no_grad()
def test_stages_are_groups_of_blocks():
    model = backbones.create_model("vig_t", depths=(3, 3, 3, 3)).eval()
    assert [len(stage.blocks) for stage in model.stages] == [3, 3, 3, 3]
    assert [info["reduction"] for info in model.feature_info] == [16] * 12
    names = model.convert_state_dict(
        {f"blocks.{i}.attn_norm.weight": torch.ones(1) for i in (0, 7)}
    )
    assert list(names) == ["stages.0.blocks.0.norm1.weight", "stages.2.blocks.1.norm1.weight"]


@torch.no_grad()
def test_maps_of_the_dense_copy():
    figures = reference("vig", "vig_h_t")
    rows = [row for row in figures["state_dict"] if not row[0].startswith("classifier.")]
    state = checkpoint(figures, rows + figures["dense_extra"])
    model = backbones.create_model("vig_h_t", out_norms=True, num_classes=0).eval()
    # Its loader takes matrices as 1×1 convolutions, too.
    state = {
        k: t[..., None, None] if k.endswith("qkv_proj.weight") else t for k, t in state.items()
    }
    report = backbones.load_checkpoint(model, {"state_dict": state}, strict=False)
    assert report.missing == ["norm.weight", "norm.bias"] and not report.unexpected
    case = figures["cases"][1]
    assert_maps(model, case, tolerance("vig"))


@each_kind
@pytest.mark.parametrize("size", [(32, 32), (57, 90)])
def test_fused(name, size):
    model = shallow(name).eval()
    x = images(2, 3, *size)
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x.double())
        backbones.fuse(model)
        assert isinstance(model.stages[0].blocks[0].attn, ViGAttention)
        for _ in range(3):  # the third one is a replay
            assert relative_error(model(x), expected) < 1e-5
    # With gradients of the image the layers run in their plain forms.
    x.requires_grad_()
    out = model(x)
    assert relative_error(out, expected) < 1e-5
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@torch.inference_mode()
def test_the_norm_of_the_hierarchical_stem_applies_the_activation():
    fused = backbones.fuse(shallow("vig_h_t").eval())
    first = [call.kernel for call in backbones.explain(fused, 64, repeats=1).calls[:4]]
    assert "layer_norm" in first and "gelu" not in first


@torch.inference_mode()
def test_maps_of_blocks_of_a_fused_model():
    model = shallow("vig_t", depths=(2, 1, 1, 1)).eval()
    x = images(1, 3, 64, 64)
    _, expected = model.forward_intermediates(x)
    backbones.fuse(model)
    for _ in range(3):
        _, maps = model.forward_intermediates(x)
        for value, of in zip(maps, expected, strict=True):
            torch.testing.assert_close(value, of, rtol=1e-4, atol=1e-4)
        model(x)


@each_kind
def test_fused_in_bfloat16(name):
    model = shallow(name).eval()
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.double()(x.double())
        fused = backbones.fuse(model.float(), dtype=torch.bfloat16)
        assert relative_error(fused(x.bfloat16()), expected) < 0.1


@pytest.mark.parametrize("act", [False, True])
@torch.no_grad()
def test_projections_joined(act):
    torch.manual_seed(0)
    attn = randomise(GatedLinearAttention(24, 3, act, eval_share=0.25)).double().eval()
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64)
    expected = attn(x)
    joined = attn.fuse()
    assert isinstance(joined, JoinedAttention)
    torch.testing.assert_close(joined(x), expected, rtol=1e-10, atol=1e-10)


def test_initial_weights():
    torch.manual_seed(0)
    plain, pyramid = (backbones.create_model(name) for name in ("vig_t", "vig_h_t"))
    assert plain.stem.position.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for model, joined in ((plain, (2 / (3 * 192) * 3) ** 0.5 * 2**-2.5), (pyramid, 0.02)):
        block = model.stages[0].blocks[0]
        dim = block.attn.qkv.in_features
        expected = (2 / (3 * dim)) ** 0.5 * 2**-2.5 if model is plain else joined
        assert block.attn.qkv.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not any(b.any() for n, b in model.named_parameters() if n.endswith("gate.bias"))


@each_kind
def test_heads_that_do_not_divide_are_refused(name):
    heads: Any = 5 if name == "vig_t" else (5, 2, 3, 4)
    with pytest.raises(ValueError, match=r"2 · num_heads must divide dim \d+, got num_heads 5"):
        backbones.create_model(name, **{**SHALLOW[name], "num_heads": heads})
