"""Checkpoints as users meet them: wrapped, prefixed, foreign, broken, hostile."""

from __future__ import annotations

import argparse
import os
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo import images

import backbones
from backbones import CheckpointError, load_checkpoint
from backbones._checkpoint import fetch_pretrained
from backbones._registry import published_weights
from backbones.cli.parity import checkpoint, image, reference, relative_error

VAN = reference("van", "van_b0")


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return checkpoint(VAN)


def _van(**kwargs: Any) -> Any:
    return backbones.create_model("van_b0", **kwargs).eval()


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
def test_wrappers(official: dict[str, Tensor], wrap: Any, suffix: str, tmp_path: Path) -> None:
    torch.save(wrap(official), tmp_path / f"van{suffix}")
    model = _van()
    report = load_checkpoint(model, tmp_path / f"van{suffix}")
    assert not (report.missing or report.unexpected or report.resized or report.ignored)
    assert _is_official(model)


def test_safetensors_and_the_factory(official: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(official, tmp_path / "van.safetensors")
    assert _is_official(_van(checkpoint_path=str(tmp_path / "van.safetensors")))


def _mmpretrain(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under mmpretrain's names."""
    renames = {
        ".proj.": ".projection.",
        "conv0.": "DW_conv.",
        "conv_spatial.": "DW_D_conv.",
        "dwconv.dwconv.": "dwconv.",
    }
    renamed = {}
    for key, tensor in official.items():
        if key.startswith("head."):
            key = key.replace("head.", "head.fc.")
        else:
            for ours, theirs in renames.items():
                key = key.replace(ours, theirs)
            if key.startswith("block"):
                key = "blocks" + key.removeprefix("block")
            key = f"backbone.{key}"
        renamed[key] = tensor
    return renamed


def test_mmpretrain_names(official: dict[str, Tensor]) -> None:
    model = _van()
    load_checkpoint(model, {"state_dict": _mmpretrain(official), "meta": {}})
    assert _is_official(model)


def test_a_detector_around_the_backbone(official: dict[str, Tensor]) -> None:
    detector = {f"backbone.{k}": v for k, v in official.items() if not k.startswith("head.")}
    detector["decode_head.conv_seg.weight"] = torch.zeros(19, 8, 1, 1)
    model = _van(num_classes=0)
    report = load_checkpoint(model, detector)
    assert report.ignored == ["decode_head.conv_seg.weight"]


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
    assert load_checkpoint(_van(num_classes=0), official).ignored == [
        "head.fc.weight",
        "head.fc.bias",
    ]


def test_output_norms_start_new_on_a_classification_checkpoint() -> None:
    figures = reference("biformer", "biformer_tiny")
    tensors = checkpoint(figures)
    model = backbones.create_model("biformer_tiny", out_norms=(0, 3), num_classes=0)
    report = load_checkpoint(model, tensors)
    assert set(report.reinitialised) == {
        f"out_norms.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")
    }
    halves = {
        **tensors,
        "extra_norms.0.weight": torch.ones(64),
        "extra_norms.0.bias": torch.ones(64),
    }
    with pytest.raises(CheckpointError, match="missing.*out_norms.3.weight"):
        load_checkpoint(model, halves)


def test_not_strict_reports(official: dict[str, Tensor]) -> None:
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


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile_was_here",)


def test_hostile_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Hostile()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(_Hostile()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(CheckpointError, match=f"{name}.*it was not run"):
            load_checkpoint(_van(), tmp_path / name)
    assert not (tmp_path / "hostile_was_here").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(
    official: dict[str, Tensor], suffix: str, share: float, tmp_path: Path
) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(official, whole)
    else:
        save_file(official, whole)
    data = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: int(len(data) * share)])
    model = _van()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"cut{suffix}"):
        load_checkpoint(model, cut)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_text_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match="page.pth"):
        load_checkpoint(_van(), tmp_path / "page.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_checkpoint(_van(), tmp_path / "nowhere.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="empty.pth holds no state dict.*epoch"):
        load_checkpoint(_van(), tmp_path / "empty.pth")


def test_another_architecture(official: dict[str, Tensor]) -> None:
    model = backbones.create_model("shvit_s1")
    with pytest.raises(CheckpointError, match=r"SHViT: \d+ tensors missing \(stem.0.conv.weight"):
        load_checkpoint(model, official)
    with pytest.raises(CheckpointError, match="SHViT"):
        load_checkpoint(model, official, strict=False)


def test_another_variant(official: dict[str, Tensor]) -> None:
    model = backbones.create_model("van_b1")
    before = model.stem.norm.weight.clone()
    with pytest.raises(CheckpointError, match=r"stem.conv.weight has shape \(32, 3, 7, 7\)"):
        load_checkpoint(model, official)
    assert torch.equal(model.stem.norm.weight, before)


def test_only_backbones_load(official: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match="Linear"):
        load_checkpoint(torch.nn.Linear(1, 1), official)


# -- published weights ---------------------------------------------------------------------------


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    expected = r"van_tiny_754.pth.tar.*save it as .*van_b0-van_tiny_754.pth.tar"
    with pytest.raises(ConnectionError, match=expected):
        backbones.create_model("van_b0", pretrained=True)


def test_download_is_cached(
    official: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def download(url: str, path: str, progress: bool) -> None:
        calls.append((url, progress))
        torch.save({"state_dict": official}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for _ in range(2):
        assert _is_official(_van(pretrained=True))
    assert calls == [(_van().default_cfg["url"], True)]
    model = _van()
    load_checkpoint(model, "https://example.org/some/van.pth?download=1")
    assert _is_official(model)
    assert (tmp_path / "checkpoints" / "van.pth").is_file()


def test_no_published_weights_says_what_exists() -> None:
    with pytest.raises(CheckpointError, match="van_b5 has no weights.*there are: van_b5.in22k"):
        backbones.create_model("van_b5", pretrained=True)
    cfg = published_weights("van_b5")["untrained"]
    with pytest.raises(CheckpointError, match="its authors published none"):
        fetch_pretrained("van_b5", cfg, {})
