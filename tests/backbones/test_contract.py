"""What every registered model promises, whatever its family."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from zoo import (
    CLASSIFIERS,
    FAMILIES,
    ISOTROPIC,
    RESTORATION,
    ROUNDED_DOWN,
    SMALL,
    STRIDE_16,
    images,
    outlines,
    randomise,
    small,
)

import backbones
from backbones.cli.parity import reference, relative_error, variants
from backbones.core.registry import published_weights

SIZES = [(3, 32, 32), (1, 96, 160), (4, 225, 223)]
PUBLISHED = {variant: reference(family, variant) for family, variant in variants()}
# Published stochastic depth, from the figures that state it and from a paper.
DROP_PATH = {
    variant: figures["drop_path_train"]
    for variant, figures in PUBLISHED.items()
    if isinstance(figures.get("drop_path_train"), float)
} | {"ravlt_t": 0.1, "ravlt_s": 0.15, "ravlt_b": 0.4, "ravlt_l": 0.55}
for variant, figures in PUBLISHED.items():
    if re.fullmatch("unireplknet_[a-z]+", variant):
        recipes = figures["recipe"]
        DROP_PATH[variant] = recipes.get("in1k", recipes.get("in22k_to_in1k"))["drop_path"]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_classifier = pytest.mark.parametrize("family", CLASSIFIERS)


def _side(family: str) -> int:
    """Of images with several windows; a restoration model's first map has the size of the image."""
    return 24 if family in RESTORATION else 64


def _keywords(family: str) -> set[str]:
    """Of the family's constructor."""
    return set(inspect.signature(type(small(family))).parameters)


def _picture(family: str) -> Tensor:
    return images(1, 3, _side(family), _side(family))


# -- every variant, without its weights --------------------------------------------------------


@pytest.fixture(scope="module", params=backbones.list_models())
def outline(request: pytest.FixtureRequest) -> nn.Module:
    """Each variant in turn, as published, without values."""
    with outlines():
        model = backbones.create_model(request.param)
    assert model.default_cfg["architecture"] == request.param
    return model.eval()


@contextlib.contextmanager
def _equal_blocks_once(model: nn.Module) -> Iterator[None]:
    """Of a stage's blocks that print alike and have parameters of the same shapes, run one."""
    blocks = [m for name, m in model.named_modules() if re.search(r"(^|\.)blocks\.\d+$", name)]
    known: dict[Any, Tensor] = {}
    for block in blocks:
        look = re.sub(r"drop_prob=[\d.e-]+", "", repr(block))
        kind = look, tuple((name, t.shape) for name, t in block.state_dict().items())

        def forward(x: Tensor, *shared: Any, _kind: Any = kind, _run: Any = block.forward) -> Any:
            call = (_kind, x.shape, x.stride())
            if call not in known:
                known[call] = _run(x, *shared)
            return tree_map(torch.empty_like, known[call])

        block.forward = forward
    yield
    for block in blocks:
        del block.forward


@torch.no_grad()
def test_shapes_and_protocol(outline):
    model = outline
    x = torch.empty(2, 3, 96, 160, device="meta")
    assert model.num_classes == model.default_cfg["num_classes"]
    for key in ("input_size", "mean", "std", "interpolation", "license", "paper_ids", "origin_url"):
        assert model.default_cfg[key], key
    assert model.get_submodule(model.first_conv).weight.shape[1] == 3
    # The pass is slow on this device: below, small models show that forward() is made of the same.
    with _equal_blocks_once(model):
        last, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    for info, feature in zip(model.feature_info, maps, strict=True):
        assert feature.shape[:2] == (2, info["num_chs"])
        for rows, size in zip(feature.shape[2:], (96, 160), strict=True):
            exact = size / info["reduction"]
            assert rows in (math.floor(exact), math.ceil(exact))
    if model.num_classes:
        assert model.forward_head(last).shape == (2, model.num_classes)
        assert model.forward_head(maps[-1], pre_logits=True).shape == (2, model.head_hidden_size)
    assert len(group_parameters(model, model.group_matcher(), reverse=True)) == len(
        list(model.parameters())
    )
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


# Families whose figures name the files that default_cfgs lists.
LINKED = {
    *("biformer", "dinat_s", "litv2", "nat_isotropic", "overlock", "proxylessnas"),
    *("unireplknet", "vmamba"),
}


@pytest.mark.parametrize("outline", sorted(PUBLISHED), indirect=True)
def test_published_architecture(outline):
    """Names and shapes of all tensors, hence depths, widths and kernels; the files; the crop."""
    variant = outline.default_cfg["architecture"]
    figures = PUBLISHED[variant]
    assert sum(p.numel() for p in outline.parameters()) == figures["params"]
    theirs = {
        name.removeprefix("backbone."): torch.empty(shape, device="meta")
        for name, shape, dtype in figures["state_dict"]
        if "int" not in dtype and name not in figures.get("derived", ())
    }
    converted = {name: t.shape for name, t in outline.convert_state_dict(theirs).items()}
    state = outline.state_dict()
    assert converted == {name: t.shape for name, t in state.items() if t.is_floating_point()}
    crop = figures.get("preprocess", {}).get("crop_pct")
    assert crop in (None, outline.default_cfg["crop_pct"])
    if type(outline).__module__.split(".")[1] in LINKED:
        links = {cfg.url for cfg in published_weights(variant).values()}
        assert {file["url"] for file in figures["weights"]} <= links


@pytest.mark.parametrize("outline", sorted(DROP_PATH), indirect=True)
def test_published_drop_path_is_the_default(outline):
    """Linear in the blocks; the first one's rate of 0 may be no layer."""
    rates = [m.drop_prob for m in outline.modules() if type(m).__name__ == "DropPath"]
    published = DROP_PATH[outline.default_cfg["architecture"]]
    count = len(rates)
    whole = torch.linspace(0, published, count + (bool(rates) and rates[0] > 0)).tolist()
    assert rates == pytest.approx(whole[len(whole) - count :], abs=1e-6)
    assert rates or not published


# -- one small model a family --------------------------------------------------------------------


def _rows(family: str, side: int, stride: int) -> int:
    """Of a map at a stride."""
    if family == "litv2":  # whose stem keeps the last rows
        return 4 * math.ceil(side / 4) // stride
    return side // stride if family in ROUNDED_DOWN else math.ceil(side / stride)


@every_family
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_any_size(family, size):
    """And any number of channels."""
    channels, *sides = size
    if family in RESTORATION:
        sides = [min(sides[0], 65), min(sides[1], 63)]
    model, x = small(family, in_chans=channels).eval(), images(1, channels, *sides)
    last, maps = model.forward_intermediates(x)
    for info, feature in zip(model.feature_info, maps, strict=True):
        assert feature.isfinite().all()
        assert [*feature.shape[2:]] == [_rows(family, side, info["reduction"]) for side in sides]
    out = model.forward_head(last) if model.num_classes else model(x)
    assert out.isfinite().all()


@every_family
def test_every_parameter_gets_a_finite_gradient(family):
    model = randomise(small(family, drop_path_rate=0.0)).train()
    # On a map of one pixel a softmax has no gradient: stride 64 needs more than 64 pixels.
    side = 24 if family in RESTORATION else 128
    out = model(images(2, 3, side, side))
    out = sum(out) if isinstance(out, tuple) else out
    (out * images(*out.shape, seed=1)).sum().backward()
    for name, parameter in model.named_parameters():
        if family == "medvitv2" and re.search(r"\.kan\.\d+\.grid$|\.unused\.", name):
            assert parameter.grad is None and not parameter.requires_grad, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_family
def test_grad_checkpointing_changes_nothing(family):
    outputs = []
    calls = [0, 0]

    def count(*call: Any) -> None:
        calls[enable] += 1

    for enable in (False, True):
        model = randomise(small(family)).eval()
        model.set_grad_checkpointing(enable)
        for block in (block for stage in model.stages for block in stage.blocks):
            if list(block.parameters()):  # of an identity, nothing is kept
                block.register_forward_pre_hook(count)
        x = _picture(family).requires_grad_()
        out = model(x)
        out.square().mean().backward()
        outputs.append((out.detach(), x.grad))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert calls[True] == 2 * calls[False] > 0  # every block is recomputed


@every_family
@torch.no_grad()
def test_intermediates_are_those_of_forward(family):
    model = small(family).eval()
    x = _picture(family)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    two = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    torch.testing.assert_close(two, [maps[0], maps[-1]])
    nhwc = model.forward_intermediates(x, indices=1, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(nhwc[0], maps[-1].permute(0, 2, 3, 1))
    early, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(early, maps[0])
    whole, _ = model.forward_intermediates(x, indices=[-1], stop_early=True)
    torch.testing.assert_close(whole, last)  # the last map, normalised
    normed = model.forward_intermediates(x, indices=[0, -1], norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[1], last)
    if family not in ISOTROPIC:  # of which all maps are normalised
        torch.testing.assert_close(normed[0], maps[0])
    for wrong in ([len(maps)], [-len(maps) - 1], len(maps) + 1, 0, [], "12", 2.5, [0, None]):
        with pytest.raises((TypeError, ValueError), match=r"indices|at least one value"):
            model.forward_intermediates(x, indices=wrong)
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@every_family
@torch.no_grad()
def test_features_only_as_timm_makes_it(family):
    name, arguments = SMALL[family]
    x = _picture(family)
    is_timms = timm.models.model_entrypoint(name).__module__.startswith("timm.")
    maker = backbones if is_timms else timm
    model = randomise(maker.create_model(name, features_only=True, **arguments)).eval()
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for reduction, feature in zip(model.feature_info.reduction(), maps, strict=True):
        assert feature.shape[2] in (x.shape[2] // reduction, math.ceil(x.shape[2] / reduction))
    first = backbones.create_model(name, features_only=True, out_indices=(0,), **arguments)
    assert len(first.model.stages) == 1
    assert first.feature_info.channels() == model.feature_info.channels()[:1]
    assert first.model.num_features == first.model.head_hidden_size == maps[0].shape[1]
    assert len(first.eval()(x)) == 1
    for feature, value in zip(backbones.fuse(model)(x), maps, strict=True):
        assert relative_error(feature, value) <= 1e-4


@pytest.mark.parametrize("family", STRIDE_16)
@torch.no_grad()
def test_stem_features_complete_the_pyramid(family):
    name, arguments = SMALL[family]
    x = _picture(family)
    model = backbones.create_model(name, features_only=True, stem_features=True, **arguments)
    maps = model.eval()(x)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32, 64]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == [2, 4, 8, 16, 32, 64]
    early, _ = model.model.forward_intermediates(x, indices=[3], stop_early=True)
    torch.testing.assert_close(early, maps[3])
    plain = backbones.create_model(name, features_only=True, **arguments).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(maps[3:], plain(x))
    stem = backbones.create_model(
        name, features_only=True, stem_features=True, out_indices=(0, 2), **arguments
    )
    assert [m.shape[2] for m in stem.eval()(x)] == [32, 8]


@pytest.mark.parametrize("family", ISOTROPIC)
@torch.no_grad()
def test_pyramids(family):
    model = small(family, pyramid=True).eval()
    maps = model.forward_intermediates(_picture(family), intermediates_only=True)
    assert [64 // m.shape[2] for m in maps] == [4, 8, 16, 32]


@every_classifier
@torch.no_grad()
def test_classifier_can_be_changed(family):
    x = images(2, 3, 64, 64)
    model = small(family, num_classes=7).eval()
    assert model(x).shape == (2, 7)
    classifier = model.get_classifier()
    assert isinstance(classifier, nn.Module)
    assert list(classifier.parameters())
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, "")
    assert model(x).shape == model.forward_features(x).shape
    assert small(family, global_pool="max").eval()(x).isfinite().all()
    assert small(family, num_classes=0).eval()(x).ndim == 2
    with pytest.raises(ValueError, match="-1"):
        model.reset_classifier(-1)


@every_family
@torch.no_grad()
def test_strides_and_batches(family):
    """An image's result depends neither on its strides nor on the others in the batch."""
    model, x = randomise(small(family)).eval(), images(2, 3, 33, 41)
    expected = model(x)
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        torch.stack((x, x), -1)[..., 0],
        torch.cat((x, x), 3)[..., :41],
    ):
        torch.testing.assert_close(model(same), expected, rtol=1e-4, atol=1e-4)
    for i in range(2):
        torch.testing.assert_close(model(x[i : i + 1])[0], expected[i], rtol=1e-4, atol=1e-4)
    assert model(x[:0]).shape == (0, *expected.shape[1:])


@every_classifier
@pytest.mark.parametrize("dtype", [torch.bfloat16, "meta", "fused"], ids=str)
@torch.no_grad()
def test_new_classifiers_are_like_the_model(family, dtype):
    """In its dtype, on its device, in its mode, and after fuse()."""
    model = small(family).eval()
    model = model.fuse(torch.bfloat16) if dtype == "fused" else model.to(dtype)
    weight = next(model.parameters())
    x = _picture(family).to(weight)
    for num_classes in (0, 3):
        model.reset_classifier(num_classes)
        assert {p.dtype for p in model.parameters()} == {weight.dtype}
        assert dtype == "fused" or not any(m.training for m in model.modules())
        for _ in range(3 if dtype == "fused" else 1):
            out = model(x)
        assert out.shape == (1, num_classes or model.head_hidden_size)
        assert (out.dtype, out.device) == (weight.dtype, weight.device)


@every_family
@torch.no_grad()
def test_dropout(family):
    """Each rate that the family has takes effect in training, and in training only."""
    x = _picture(family)
    x = torch.cat([x, x.flip(2)] * 2)  # of so many, not all draw alike
    options = {"drop_rate", "drop_path_rate", "proj_drop_rate"}
    own = options & _keywords(family)
    for option in ("", *own):
        model = randomise(small(family, **{name: 0.5 * (name == option) for name in own})).train()
        outs = [model(x) for _ in range(2)]
        # Of a classifier with an auxiliary one, its own.
        first, second = (out[0] if isinstance(out, tuple) else out for out in outs)
        assert torch.allclose(first, second, rtol=1e-2) is not bool(option), option
    model = small(family, **dict.fromkeys(own, 0.5)).eval()
    assert torch.equal(model(x), model(x))
    for option in options - own:
        with pytest.raises(TypeError, match=option):
            small(family, **{option: 0.5})


@every_family
@torch.no_grad()
def test_copies(family, tmp_path):
    model, x = randomise(small(family)).eval(), _picture(family)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    name, arguments = SMALL[family]
    path = str(tmp_path / "model.safetensors")
    loaded = backbones.create_model(name, checkpoint_path=path, **arguments).eval()
    for copied in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))


# Of OverLoCK, a normalised map also goes on.
DENSE = [f for f in CLASSIFIERS if f != "overlock" and "out_norms" in _keywords(f)]


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_output_norms_are_beside_the_trunk(family):
    """A dense network takes a classifier's weights, and normalises the maps alone."""
    plain, x = randomise(small(family)).eval(), _picture(family)
    raw = plain.forward_intermediates(x, intermediates_only=True)
    dense = small(family, out_norms=True, num_classes=0).eval()
    report = backbones.load_checkpoint(dense, plain.state_dict())
    assert {name.split(".")[0] for name in report.reinitialised} == {"out_norms"}
    assert {"head"} <= {name.split(".")[0] for name in report.ignored} <= {"head", "norm"}
    maps = dense.forward_intermediates(x, intermediates_only=True)
    for norm, value, normalised in zip(dense.out_norms.values(), raw, maps, strict=True):
        torch.testing.assert_close(normalised, norm(value))
        assert not torch.allclose(normalised, value, rtol=0.1)
    some = small(family, out_norms=(0, 2)).eval()
    backbones.load_checkpoint(some, plain.state_dict())
    torch.testing.assert_close(some(x), plain(x))
    chosen = some.forward_intermediates(x, intermediates_only=True)
    for stage, value in enumerate(chosen):
        torch.testing.assert_close(value, raw[stage] if stage % 2 else maps[stage])


@every_family
@torch.no_grad()
def test_fuse_by_our_name_and_timms(family, tmp_path):
    """And its weights, loaded into a fresh model; precisions and paths: ``fusing/test_fuse.py``."""
    model, x = randomise(small(family)).eval(), _picture(family)
    expected = model(x)
    by_timm = timm.utils.reparameterize_model(model)
    assert torch.equal(model(x), expected)
    fused = backbones.fuse(model)
    assert fused is model and fused.fuse() is model
    for each in (fused, by_timm):
        assert relative_error(each(x), expected) <= 1e-4
        # Of these two, some are on shortcuts or before a padded convolution.
        kept = nn.BatchNorm1d if family in ("biformer", "medvitv2") else _BatchNorm
        assert not any(isinstance(m, kept) for m in each.modules())
        with pytest.raises(RuntimeError, match="fused"):
            each.train()
    torch.testing.assert_close(by_timm.state_dict(), fused.state_dict(), rtol=0, atol=0)
    name, arguments = SMALL[family]
    path = tmp_path / "fused.safetensors"
    save_file(fused.state_dict(), path)
    again = backbones.create_model(name, checkpoint_path=str(path), **arguments).eval()
    assert load_file(path).keys() == again.state_dict().keys()
    # Loading fuses a model whose names differ then, so that one of the two may be the faster form.
    assert relative_error(again(x), fused(x)) <= 1e-5


@every_family
@torch.no_grad()
def test_half_precision(family):
    """As autocast computes it, and all of it."""
    model, x = randomise(small(family)).eval(), _picture(family)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x), exact) < 0.3
    assert relative_error(model.bfloat16()(x.bfloat16()), exact) < 0.3


# Arguments for tracing, which takes long for each block: every kind of block and stage, once or so.
TRACED: dict[str, dict[str, Any]] = {
    "biformer": {"dims": (64, 96), "depths": (1, 1), "mlp_ratios": (3, 3), "topks": (4, None)},
    "dinat_s": {"dims": (32, 64), "num_heads": (1, 2), "depths": (1, 2), "dilations": (1, (1, 2))},
    "efficientvit": {"dims": (32, 64), "num_heads": (2, 2), "depths": (1, 1)},
    "favit": {
        **{"dims": (32, 64), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (8, 6)},
        "sr_ratios": (4, 1),
    },
    "hat": {"depths": (2,), "num_heads": (2,)},
    "inception_next": {"dims": (40, 80), "depths": (1, 1), "mlp_ratios": (4, 3)},
    "litv2": {
        **{"dims": (32, 48, 64), "num_heads": (0, 4, 4), "depths": (1, 1, 1)},
        "window_sizes": (1, 2, 1),
    },
    "medvitv2": {"depths": (1, 2, 1, 1)},
    "overlock": {"focus_depths": (1, 1), "kernel_sizes": (7, 7, 7, 7)},
    "nat": {"dims": (64, 96), "num_heads": (2, 3), "depths": (2, 1), "dilations": ((1, 2), 1)},
    "proxylessnas": {
        "dims": ((24,), (32, 32, 32), (48,)),
        "kernel_sizes": ((3,), (5, 0, 3), (7,)),
        "expansions": ((1,), (3, 0, 3), (6,)),
    },
    "ravlt": {
        **{"dims": (64, 128), "num_heads": (1, 2), "depths": (1, 1), "linear": (True, False)},
        "layer_scales": (1, 1),
    },
    "shvit": {"dims": (128, 224), "depths": (1, 1), "attn_dims": (0, 48)},
    "unireplknet": {"dims": (40, 80), "depths": (1, 1), "kernel_sizes": (3, 13)},
    "van": {"dims": (32, 64), "depths": (1, 1), "mlp_ratios": (8, 4)},
    "vig": {"dims": (64, 96), "num_heads": (2, 3), "depths": (1, 1)},
    "vmamba": {"dims": (32, 48), "depths": (1, 1)},
}


def _traceable(family: str) -> nn.Module:
    model = small(family, **TRACED.get(family, {})).eval()
    if family in ISOTROPIC:
        del model.stages[2:]  # of four that are alike
    assert set(map(type, model.modules())) == set(map(type, small(family).modules()))
    return model


# Small ones, in which attention, our operators and convolutions are traced.
QUICK = ("inception_next", "nat_isotropic", "vrwkv")


def _slow(family: str, *quick: str) -> Any:
    return () if family in quick else pytest.mark.slow


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=_slow(f, "litv2", "shvit", *QUICK)) for f in FAMILIES]
)
def test_export(family):
    model, side = _traceable(family), _side(family)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(
        model, (images(2, 3, side, side),), dynamic_shapes=({0: batch},), strict=False
    )
    x = images(3, 3, side, side)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((f, "eager") for f in FAMILIES if f not in QUICK),
        # Traces all that the other one does, and the backward pass.
        *(pytest.param(f, "aot_eager", marks=_slow(f, *QUICK)) for f in FAMILIES),
    ],
)
def test_compiles_into_one_graph(family, backend):
    torch.compiler.reset()
    model, side = _traceable(family), _side(family)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = images(1, 3, side, side).requires_grad_()
    out = compiled(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.slow
# torch's own inductor decorates with the deprecated torch.jit when it is first imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@every_family
@torch.no_grad()
def test_compiles_with_inductor(family):
    torch.compiler.reset()
    model = small(family).eval()
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-3
    )
