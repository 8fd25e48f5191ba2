"""Loading checkpoints: wrappers, prefixes, other releases' names, mismatches."""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import FAMILIES, Mould, images, randomise, small

import backbones
from backbones import CheckpointError, load_checkpoint
from backbones.cli.parity import checkpoint, image, reference, relative_error
from backbones.core.checkpoint import read_checkpoint, require_finite

VAN = reference("van", "van_b0")


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return checkpoint(VAN)


@pytest.fixture(scope="module")
def wanted(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with the official weights, whose logits are the published ones."""
    model = _van()
    load_checkpoint(model, official)
    assert _is_official(model)
    return dict(model.state_dict())


@functools.cache
def _mould(**kwargs: Any) -> Mould:
    with torch.inference_mode(False):
        return Mould(backbones.create_model("van_b0", **kwargs).eval())


def _van(**kwargs: Any) -> Any:
    return _mould(**kwargs).copy()


@torch.no_grad()
def _is_official(model: Any) -> bool:
    case = VAN["cases"][0]
    return relative_error(model(image(case["input"], case["seed"])), case["logits"]) < 1e-5


# -- what must load ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t, "epoch": 3, "arch": "van"},
        lambda t: {"model": t, "args": argparse.Namespace(lr=1.0, output=Path("x"))},
        lambda t: {"model": {k: v * 0 for k, v in t.items()}, "model_ema": t},
        lambda t: {"params": {k: v * 0 for k, v in t.items()}, "params_ema": t},
        lambda t: {"state_dict": {f"module.{k}": v for k, v in t.items()}},
        lambda t: {"model": {f"_orig_mod.module.{k}": v for k, v in t.items()}},
    ],
    ids=["bare", "state_dict", "model", "model_ema", "params_ema", "module.", "compiled"],
)
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pth.tar"])
def test_wrappers(
    official: dict[str, Tensor], wanted: dict[str, Tensor], wrap: Any, suffix: str, tmp_path: Path
) -> None:
    torch.save(wrap(official), tmp_path / f"van{suffix}")
    model = _van()
    report = load_checkpoint(model, tmp_path / f"van{suffix}")
    assert not (report.missing or report.unexpected or report.resized or report.ignored)
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_mmpretrain_names(official: dict[str, Tensor]) -> None:
    names = {key: f"backbone.{key}" for key in official}
    for ours, theirs in (
        *((".proj.", ".projection."), ("conv0.", "DW_conv."), ("conv_spatial.", "DW_D_conv.")),
        *(("dwconv.dwconv.", "dwconv."), (".block", ".blocks"), ("backbone.head.", "head.fc.")),
    ):
        names = {key: name.replace(ours, theirs) for key, name in names.items()}
    model = _van()
    load_checkpoint(model, {"state_dict": {names[k]: t for k, t in official.items()}, "meta": {}})
    assert _is_official(model)


def test_features_only_takes_the_whole_checkpoint(official: dict[str, Tensor]) -> None:
    features = _van(features_only=True, out_indices=(0, 1))
    load_checkpoint(features, official)
    with pytest.raises(CheckpointError, match="surplus"):
        load_checkpoint(features, {**official, "block1.9.surplus": torch.zeros(1)})
    whole = _van()
    load_checkpoint(whole, official)
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(
        features(x), whole.forward_intermediates(x, [0, 1], intermediates_only=True)
    )


def test_another_number_of_classes_or_channels(
    official: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = _van(num_classes=10, in_chans=1)
    report = load_checkpoint(model, official)
    assert report.reinitialised == ["head.fc.weight", "head.fc.bias"]
    assert report.resized == ["stem.conv.weight"]
    assert "2 reinitialised (head.fc.weight, head.fc.bias)" in caplog.text
    summed = official["patch_embed1.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.conv.weight, summed)
    heads = ["head.fc.weight", "head.fc.bias"]
    assert load_checkpoint(_van(num_classes=0), official).ignored == heads


def test_some_of_the_output_norms() -> None:
    """A file that has one must have all; a classifier's has none, see ``test_contract.py``."""
    figures = reference("biformer", "biformer_tiny")
    tensors = checkpoint(figures)
    model = backbones.create_model("biformer_tiny", out_norms=(0, 3), num_classes=0)
    one = {f"extra_norms.0.{name}": torch.ones(64) for name in ("weight", "bias")}
    with pytest.raises(CheckpointError, match="missing.*out_norms.3.weight"):
        load_checkpoint(model, {**tensors, **one})


def test_non_strict_loading_reports(official: dict[str, Tensor]) -> None:
    partial = {k: v for k, v in official.items() if not k.startswith("block4")}
    partial["block1.0.surplus.weight"] = torch.zeros(1)
    report = load_checkpoint(_van(), partial, strict=False)
    assert report.unexpected == ["stages.0.blocks.0.surplus.weight"]
    assert report.missing and all(k.startswith("stages.3.blocks.") for k in report.missing)


@torch.no_grad()
def test_fused_shvit_of_the_original_loads() -> None:
    figures = reference("shvit", "shvit_s1")
    model = backbones.create_model("shvit_s1").eval()
    load_checkpoint(model, checkpoint(figures))
    x = images(1, 3, 64, 64)
    expected = model(x)
    # The original's fused tensors come in the order of ours, under its own names.
    rows = figures["fused"]["state_dict"]
    tensors = model.fuse().state_dict().values()
    assert [tuple(shape) for _, shape, _ in rows] == [tuple(t.shape) for t in tensors]
    published = {name: t for (name, _, _), t in zip(rows, tensors, strict=True)}

    fresh = backbones.create_model("shvit_s1").eval()
    load_checkpoint(fresh, published)
    assert fresh.fused
    assert relative_error(fresh(x), expected) < 1e-5
    assert sum(p.numel() for p in fresh.parameters()) == figures["fused"]["params"]
    headless = backbones.create_model("shvit_s1", num_classes=0).eval()
    assert len(load_checkpoint(headless, published).ignored) == 2
    features = backbones.create_model("shvit_s1", features_only=True, out_indices=(0, 1)).eval()
    load_checkpoint(features, published)
    assert headless.fused and features.model.fused


# -- what must not -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "strict", "said"),
    [
        ("shvit_s1", True, r"SHViT: \d+ tensors missing \(stem.0.conv.weight"),
        ("shvit_s1", False, "SHViT"),
        ("van_b1", True, r"stem.conv.weight has shape \(32, 3, 7, 7\)"),
    ],
)
def test_another_model(official: dict[str, Tensor], name: str, strict: bool, said: str) -> None:
    model = backbones.create_model(name)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(model, official, strict=strict)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_non_finite_weights(official: dict[str, Tensor], value: str) -> None:
    spoilt = {**official, "patch_embed1.proj.weight": official["patch_embed1.proj.weight"].clone()}
    spoilt["patch_embed1.proj.weight"][3, 1, 2, 2] = float(value)
    model = _van()
    before = model.stem.conv.weight.clone()
    with pytest.raises(CheckpointError, match="NaN or infinite weights: stem.conv.weight$"):
        load_checkpoint(model, spoilt)
    assert torch.equal(model.stem.conv.weight, before)
    require_finite(model, "a.pth")
    report = load_checkpoint(model, spoilt, strict=False)
    assert report.nonfinite == ["stem.conv.weight"]
    with pytest.raises(CheckpointError, match="a.pth has NaN or infinite weights: stem.conv"):
        require_finite(model, "a.pth")


def test_values_that_overflow_the_models_dtype(official: dict[str, Tensor]) -> None:
    wide = {k: v.double() if v.is_floating_point() else v for k, v in official.items()}
    wide["head.bias"][1] = 1e300
    with pytest.raises(CheckpointError, match="infinite weights: head.fc.bias"):
        load_checkpoint(_van(), wide)


def test_other_kinds_of_models_and_sources(official: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match="Linear"):
        load_checkpoint(torch.nn.Linear(1, 1), official)
    for source in (None, ["a.pth"], 3, b"a.pth", {"weight"}):
        said = f"a path, a URL or a .*, got .*{re.escape(repr(source))}"
        with pytest.raises(TypeError, match=said):
            load_checkpoint(small("van"), source)  # type: ignore[arg-type]


def test_not_a_state_dict(tmp_path: Path) -> None:
    for content, said in (
        (None, "is not a state dict, but None"),
        ([1, 2], r"is not a state dict, but list \[1, 2\]"),
        ("van", "is not a state dict, but str 'van'"),
        ({"epoch": 3}, r"has no state dict \(keys epoch\)"),
        ({"state_dict": [1]}, r"has no state dict \(keys state_dict\)"),
        ({"model": {}}, r"has no state dict \(keys none\)"),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=f"a.pth {said}$"):
            read_checkpoint(tmp_path / "a.pth")


@pytest.mark.timeout(20)
def test_a_checkpoint_that_contains_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = {"model": content}
    torch.save(content, tmp_path / "a.pth")
    for source, said in ((content, ""), (tmp_path / "a.pth", "a.pth .*")):
        with pytest.raises(CheckpointError, match=f"{said}contains itself"):
            load_checkpoint(small("van"), source)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.to("meta"), "has no data"),
        (lambda t: t.to_sparse(), "is sparse or quantised"),
        (lambda t: t.to(torch.complex64), "is complex"),
        (lambda t: t.to(torch.int32), "is of torch.int32"),
    ],
    ids=["meta", "sparse", "complex", "integers"],
)
def test_tensors_that_do_not_copy_exactly(change: Any, said: str) -> None:
    model = small("van")
    state = model.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    state["head.fc.weight"] = change(state["head.fc.weight"] + 1)
    with pytest.raises(CheckpointError, match=f"head.fc.weight {said}"):
        load_checkpoint(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_two_tensors_for_one_parameter() -> None:
    state = small("van").state_dict()
    twice = {**state, **{f"module.{k}": v * 0 for k, v in state.items()}}
    with pytest.raises(CheckpointError, match="both 'module.stem.conv.weight' and 'stem.conv"):
        load_checkpoint(small("van"), twice)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_plain_weights(family: str) -> None:
    """Fused weights fuse a plain model; plain ones are refused by a fused model, which says so."""
    plain = randomise(small(family)).eval()
    plain_state = {k: v.clone() for k, v in plain.state_dict().items()}
    fused = randomise(small(family)).eval().fuse(channels_last=False)
    fused_state = {k: v.clone() for k, v in fused.state_dict().items()}
    # Nothing to fold: the two are the same.
    if family in ("dinat_s", "hat", "nat_isotropic", "vrwkv"):
        assert fused_state.keys() == plain_state.keys()
        assert all(torch.equal(v, fused_state[k]) for k, v in plain_state.items())
        return
    with pytest.raises(CheckpointError, match="fit the fused .*before fuse"):
        load_checkpoint(fused, plain_state)
    with pytest.raises(RuntimeError, match="has been fused.*before fuse"):
        fused.load_state_dict(plain_state)
    assert all(torch.equal(v, fused_state[k]) for k, v in fused.state_dict().items())
    load_checkpoint(plain, fused_state)
    assert plain.fused
    surplus = {**fused_state, "surplus.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"fit the fused .*, 1 unexpected \(surplus.weight\)"):
        load_checkpoint(small(family), surplus)
    assert fused.load_state_dict(surplus, strict=False).unexpected_keys == ["surplus.weight"]
