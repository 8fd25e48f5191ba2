"""``fuse(torch.int8)`` on networks of other packages: errors, layers, copies, changes, files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from compiled_kernels import without_kernels
from safetensors.torch import save_file
from timm_models import Branching, network, vit_of_transformers
from torch import Tensor, nn
from zoo import images, small

import backbones
from backbones.fusing import quantization
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

_REASON = not_faster_in_int8(torch.device("cpu"))
_needs_int8 = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")
_MAPS = policy.maps_of_int8()
pytestmark = pytest.mark.usefixtures("small_layers_too")

# The models, and kernels that must compute in int8.
KERNELS = {
    "resnet": {"packed_conv2d", "packed_linear"},
    "vision_transformer": {"packed_mlp", "packed_linear"},
    "convnext": {"packed_mlp"},
    "efficientnet": {"packed_conv2d", "packed_linear"},
    "mobilenetv3": {"packed_linear"},
}
SLOW = (
    *("beit", "byobnet", "edgenext", "fasternet", "fastvit", "ghostnet", "hgnet", "levit"),
    *("maxxvit", "metaformer", "mobilevit", "nfnet", "pvt_v2", "regnet", "repvit", "xcit"),
)


@pytest.fixture(autouse=True)
def windows_with_tiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense convolutions also where they stay in floats."""
    monkeypatch.setattr(policy, "windows_pay_in_int8", lambda channels, dtype: channels > 3)


def _small(module: str, images: int = 2) -> tuple[nn.Module, Tensor]:
    """A network with scales of layers that are far from 0, and images for it."""
    model, x = network(module, images)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "gain", "grn.weight", "grn.bias")):
            nn.init.uniform_(parameter, 0.1, 1)
    return model, x


def _error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.norm()).item()


def _run(model: nn.Module, x: Tensor) -> Tensor:
    """What the third call returns: of a fused model, a replay."""
    with torch.inference_mode():
        return [model(x.to(next(model.parameters()).dtype)) for _ in range(3)][-1]


def _check(model: nn.Module, x: Tensor, limit: float, agreement: float = 0) -> set[tuple[str, str]]:
    """Assert how close it is to float32, calibrated and not; return its kernels and their dtypes.

    Args:
        limit: of the relative error.
        agreement: the least share of images with the same best class, of random weights.
    """
    expected = _run(model, x)
    for calibrate in (None, [x]):
        fused: Any = backbones.fuse(copy.deepcopy(model), torch.int8, calibrate=calibrate)
        with torch.inference_mode():
            first = fused(x.to(_MAPS))
        out = _run(fused, x)
        assert out.dtype == _MAPS and fused.is_replayed and torch.equal(first, out)
        assert fused.precision.quantized and fused.precision.calibrated == (calibrate is not None)
        assert _error(out, expected) < limit
        assert (out.argmax(1) == expected.argmax(1)).float().mean() >= agreement
    found = backbones.explain(fused, x.shape[-1], repeats=1)
    quantized, layers = len(fused.precision.quantized), len(fused.precision.layers)
    assert f"{quantized} of {layers} layers in int8 (calibrated ranges)" in str(found)
    return {(call.kernel, call.dtype) for call in found.calls}


# One with windows and one with feed-forwards among the quick tests.
_SOME = [
    m if m in ("resnet", "vision_transformer") else pytest.param(m, marks=pytest.mark.slow)
    for m in KERNELS
]


@_needs_int8
@pytest.mark.parametrize("module", _SOME)
def test_close_to_float32(module: str) -> None:
    """With the bound of this library's families halved, and by kernels in int8."""
    kernels = _check(*_small(module, images=10), limit=0.05, agreement=0.7)
    assert {(name, "int8") for name in KERNELS[module]} <= kernels
    assert ("packed_mlp", str(_MAPS).removeprefix("torch.")) not in kernels


@_needs_int8
@pytest.mark.slow
@pytest.mark.parametrize("module", SLOW)
def test_more_networks_are_close_to_float32(module: str) -> None:
    model, x = _small(module)
    rounded = _error(_run(copy.deepcopy(model).to(_MAPS), x), _run(model, x))
    _check(model, x, limit=max(0.1, 3 * rounded))


@_needs_int8
def test_copies_pickles_files_and_changes(tmp_path: Path) -> None:
    """They compute exactly the same; changed weights are quantised again, and ranges stay."""
    model, x = _small("resnet")
    fused: Any = backbones.fuse(copy.deepcopy(model), torch.int8, calibrate=x)
    expected, precision = _run(fused, x), str(fused.precision)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(_run(other, x), expected) and str(other.precision) == precision
        assert other.state_dict().keys() == model.state_dict().keys()
    save_file(fused.int8_state_dict(), tmp_path / "a.safetensors")
    size = sum(t.numel() * t.itemsize for t in fused.state_dict().values())
    assert (tmp_path / "a.safetensors").stat().st_size < size
    loaded: Any = _small("resnet")[0]
    for parameter in loaded.parameters():
        parameter.data.mul_(0.5)
    backbones.load_checkpoint(loaded, tmp_path / "a.safetensors")
    assert loaded.precision.quantized == fused.precision.quantized and loaded.precision.calibrated
    assert torch.equal(_run(loaded, x), expected)
    weight = fused.layer2[0].conv1.weight
    with torch.no_grad():
        weight.mul_(-1)
        changed = _run(fused, x)
        model.layer2[0].conv1.weight.mul_(-1)
        assert 0 < _error(changed, _run(model, x)) < 0.05 < _error(changed, expected)
        weight.mul_(-1)
    for _ in range(2):  # after several changes, some calls run as before
        again = _run(fused, x)
    assert torch.equal(again, expected)


@_needs_int8
def test_fusing_again() -> None:
    """Without a dtype, layers and ranges stay; with another one, the network computes in that."""
    model, x = _small("vision_transformer")
    fused: Any = backbones.fuse(copy.deepcopy(model), torch.int8, calibrate=x)
    assert not fused.is_replayed  # nothing is kept of the image that confirms the layers
    before, told = _run(fused, x), str(fused.precision)
    quantized = fused.precision.quantized
    for again in (backbones.fuse(fused), backbones.fuse(fused, torch.int8)):
        assert torch.equal(_run(again, x), before) and str(again.precision) == told
    floats = backbones.fuse(copy.deepcopy(model), _MAPS)
    assert torch.equal(_run(backbones.fuse(fused, _MAPS), x), _run(floats, x))
    assert fused.precision is None
    assert not backbones.fuse(fused, torch.int8).precision.calibrated  # type: ignore[union-attr]
    backbones.fuse(fused, torch.int8, calibrate=x, max_drop=1.0)
    assert fused.precision.drop > 0 and fused.precision.quantized == quantized


@_needs_int8
def test_layers_in_floats_are_named() -> None:
    """A classifier, and layers that a kernel of their block computes or another weight."""
    model: Any = _small("mobilenetv3")[0]
    with torch.no_grad():
        model.conv_head.weight[0, 0] = float("nan")
    fused: Any = backbones.fuse(model, torch.int8)
    reasons = {layer.layer: layer.reason for layer in fused.precision.layers}
    assert "classifier" in reasons["classifier"] and "NaN" in reasons["conv_head"]
    assert "window" in reasons["conv_stem"]
    narrow = [n for n, reason in reasons.items() if reason == "in a block with a kernel of its own"]
    assert narrow and not any(hasattr(fused.get_submodule(n), "quantization") for n in narrow)
    standardised: Any = backbones.fuse(timm.create_model("resnetv2_50x1_bit").eval(), torch.int8)
    assert standardised.precision.quantized == []


@_needs_int8
def test_weights_that_other_modules_multiply() -> None:
    """BEiT's attention calls no module for its queries, keys and values."""
    model = timm.models.beit.Beit(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "classifier": "head"}
    nn.init.normal_(model.blocks[0].attn.qkv.weight)
    x = torch.randn(2, 3, 32, 32)
    fused: Any = backbones.fuse(copy.deepcopy(model).eval(), torch.int8)
    assert "blocks.0.attn.qkv" in fused.precision.quantized
    assert _error(_run(fused, x), _run(model.eval(), x)) < 0.1
    calibrated: Any = backbones.fuse(copy.deepcopy(model).eval(), torch.int8, calibrate=x)
    (entry,) = (e for e in calibrated.precision.layers if e.layer == "blocks.0.attn.qkv")
    assert entry.reason.startswith("not called")


@_needs_int8
def test_networks_that_do_not_say_their_size() -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model("resnet18", weights=None).eval()
    x = torch.randn(1, 3, 48, 48)
    for calibrate in (None, x):
        fused: Any = backbones.fuse(copy.deepcopy(model), torch.int8, calibrate=calibrate)
        assert len(fused.precision.quantized) == 19  # all but the first and the last one
        assert _error(_run(fused, x), _run(model, x)) < 0.05
    with pytest.raises(ValueError, match=r"max_drop needs calibrate=…: ResNet does not say which"):
        backbones.fuse(copy.deepcopy(model), torch.int8, max_drop=0.1)
    within: Any = backbones.fuse(copy.deepcopy(model), torch.int8, calibrate=x, max_drop=0.01)
    assert 0 < within.precision.drop <= 0.01


@_needs_int8
@torch.inference_mode()
def test_a_backbone_of_transformers() -> None:
    model, x = vit_of_transformers(), torch.randn(2, 3, 32, 32)
    expected = model(x).last_hidden_state
    fused: Any = backbones.fuse(model, torch.int8, calibrate=[x], max_drop=0.05)
    assert len(fused.precision.quantized) == 12
    for _ in range(3):
        out = fused(pixel_values=x.to(_MAPS)).last_hidden_state
    assert fused.is_replayed and _error(out, expected) < 0.05


@_needs_int8
def test_parts_of_a_network_that_is_not_recorded() -> None:
    model, x = Branching().eval(), torch.rand(1, 3, 64, 64)
    fused: Any = backbones.fuse(copy.deepcopy(model), torch.int8, calibrate=x)
    assert "body.layer1.0.conv1" in fused.precision.quantized
    for _ in range(2):  # the whole, then its parts
        assert 1e-4 < _error(_run(fused, x), _run(model, x)) < 0.05
    assert not fused.is_replayed and fused.body.is_replayed


@_needs_int8
def test_a_refused_calibration_leaves_the_model_alone() -> None:
    model = _small("resnet")[0]
    nan = torch.full((1, 3, 8, 8), float("nan"))
    for batches, message in (
        ([nan], "batch 0 has NaN"),
        ([], "at least one batch"),
        ("a", "a str"),
    ):
        with pytest.raises(ValueError, match=message):
            backbones.fuse(model, torch.int8, calibrate=batches)
    assert _run(model, torch.zeros(1, 3, 64, 64)).dtype == torch.float32


@_needs_int8
def test_images_that_it_does_not_take() -> None:
    model = torchvision.models.get_model("resnet18", weights=None)
    with pytest.raises(
        ValueError, match=r"ResNet does not accept images of \(1, 1, 64, 64\), with which"
    ):
        backbones.fuse(model, torch.int8, calibrate=torch.zeros(1, 1, 64, 64))
    grey: Any = backbones.fuse(timm.create_model("test_resnet", in_chans=1).eval(), torch.int8)
    assert grey.precision.quantized


@pytest.mark.parametrize("kind", ["a family", "resnet"])
def test_where_it_does_not_pay(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model stays in float32, and one warning says why."""
    without_kernels(monkeypatch)
    quantization._warn_not_faster.cache_clear()
    model, x = (small("shvit").eval(), images(1, 3, 64, 64)) if kind != "resnet" else _small(kind)
    fused: Any = [backbones.fuse(copy.deepcopy(model), torch.int8) for _ in range(2)][0]
    (record,) = [r for r in caplog.records if "stays in float32" in r.message]
    assert "VISION_BACKBONES_NATIVE=0" in record.message
    assert fused.precision.reason and not fused.precision.quantized
    assert next(fused.parameters()).dtype == torch.float32
    assert _error(_run(fused, x), _run(model, x)) < 1e-5
