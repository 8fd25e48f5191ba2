"""``fuse(torch.int8)``: accuracy, layers, calibration, copies, changes, state dicts and files."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm_models import Branching, network
from torch import Tensor, nn
from zoo import FAMILIES, RESTORATION, images, randomise, small

import backbones
from backbones.fusing import quantization
from backbones.fusing.calibration import Call
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

_REASON = not_faster_in_int8(torch.device("cpu"))
_MAPS = policy.maps_of_int8()
_FLOATS = str(_MAPS).removeprefix("torch.")
pytestmark = [
    pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}"),
    pytest.mark.usefixtures("small_layers_too"),
]
_SIZE = (1, 3, 64, 64)
_OWN_KERNEL = "in a block with a kernel of its own"

# Models of timm, and kernels that must compute in int8.
KERNELS = {
    "resnet": {"packed_conv2d", "packed_linear"},
    "vision_transformer": {"packed_mlp", "packed_linear"},
    "convnext": {"packed_mlp"},
    "efficientnet": {"packed_conv2d", "packed_linear"},
    "mobilenetv3": {"packed_linear"},
}
MORE = (
    *("beit", "byobnet", "edgenext", "fasternet", "fastvit", "ghostnet", "hgnet", "levit"),
    *("maxxvit", "metaformer", "mobilevit", "nfnet", "pvt_v2", "regnet", "repvit", "xcit"),
)


@pytest.fixture(autouse=True)
def windows_with_tiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense convolutions also where they stay in floats."""
    monkeypatch.setattr(policy, "windows_pay_in_int8", lambda channels, dtype: channels > 3)


def _of_timm(module: str, images: int = 2) -> tuple[Any, Tensor]:
    """A network with scales of layers that are far from 0, and images for it."""
    model, x = network(module, images)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "gain", "grn.weight", "grn.bias")):
            nn.init.uniform_(parameter, 0.1, 1)
    return model, x


def _halved(model: Any) -> Any:
    """With other weights."""
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model.eval()


@pytest.fixture(scope="module")
def plain(small_layers_too: None) -> Any:
    """For small images, also where there are none and some are drawn."""
    return randomise(small("shvit", pretrained_cfg_overlay={"input_size": _SIZE[1:]})).eval()


@pytest.fixture
def shvit(plain: Any) -> Any:
    return copy.deepcopy(plain)


@pytest.fixture(params=["shvit", "resnet"])
def sample(request: pytest.FixtureRequest, plain: Any) -> tuple[Any, Tensor]:
    """A network of this library or of timm, and images for it."""
    if request.param == "shvit":
        return copy.deepcopy(plain), images(2, *_SIZE[1:])
    return _of_timm("resnet")


@pytest.fixture(scope="module")
def calibrated(plain: Any) -> Any:
    return copy.deepcopy(plain).fuse(torch.int8, calibrate=images(*_SIZE))


@pytest.fixture
def state(calibrated: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in calibrated.int8_state_dict().items()}


def _fused(model: Any, **options: Any) -> Any:
    """A copy in int8."""
    return backbones.fuse(copy.deepcopy(model), torch.int8, **options)


def _error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.norm()).item()


def _run(model: Any, x: Tensor | None = None) -> Tensor:
    """What the sixth call returns: of a fused model, a replay."""
    x = images(*_SIZE) if x is None else x
    with torch.inference_mode():
        return [model(x.to(next(model.parameters()).dtype)) for _ in range(6)][-1]


def _check(model: Any, x: Tensor, limit: float, agreement: float = 0) -> Any:
    """Assert how close it is to float32, calibrated and not; return the calibrated one.

    Args:
        limit: of the relative error.
        agreement: the least share of images with the same best class, of random weights.
    """
    expected = _run(model, x)
    for calibrate in (None, iter([x])):
        fused = _fused(model, calibrate=calibrate)
        out = _run(fused, x)
        assert out.dtype == _MAPS and fused.is_replayed and torch.equal(_run(fused, x), out)
        assert fused.precision.quantized and fused.precision.calibrated == (calibrate is not None)
        assert _error(out, expected) < limit
        assert (out.argmax(1) == expected.argmax(1)).float().mean() >= agreement
    return fused


def test_all_calls_compute_in_int8(sample: tuple[Any, Tensor]) -> None:
    """Also those that are recorded, and in another size than that of the calibration."""
    model, x = sample
    fused = _fused(model, calibrate=x)
    with torch.inference_mode():
        for images in (x, x[..., :-32]):
            images = images.to(next(fused.parameters()).dtype)
            first, *others = (fused(images) for _ in range(5))
            assert all(torch.equal(first, other) for other in others)
            assert _error(first, model(images.float())) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """Close to float32, and the same from a state dict."""
    model = randomise(small(family)).eval()
    side, limit = (24, 0.02) if family in RESTORATION else (64, 0.1)  # of several windows
    x = images(2, 3, side, side)
    fused = _check(model, x, limit)
    loaded = _halved(small(family))
    backbones.load_checkpoint(loaded, fused.int8_state_dict())
    assert loaded.precision.quantized == fused.precision.quantized and loaded.precision.calibrated
    assert torch.equal(_run(loaded, x), _run(fused, x))


# One with windows and one with feed-forwards among the quick tests.
@pytest.mark.parametrize(
    "module",
    [
        m if m in ("resnet", "vision_transformer") else pytest.param(m, marks=pytest.mark.slow)
        for m in (*KERNELS, *MORE)
    ],
)
def test_networks_of_timm(module: str) -> None:
    """With half the bound of this library's families, by kernels in int8, where they are known."""
    model, x = _of_timm(module, images=10 if module in KERNELS else 2)
    if module in KERNELS:
        fused = _check(model, x, limit=0.05, agreement=0.7)
    else:
        rounded = _error(_run(copy.deepcopy(model).to(_MAPS), x), _run(model, x))
        fused = _check(model, x, limit=max(0.1, 3 * rounded))
    found = backbones.explain(fused, x.shape[-1], repeats=1)
    quantized, layers = len(fused.precision.quantized), len(fused.precision.layers)
    assert f"{quantized} of {layers} layers in int8 (calibrated ranges)" in str(found)
    if module in KERNELS:
        kernels = {(call.kernel, call.dtype) for call in found.calls}
        assert {(name, "int8") for name in KERNELS[module]} <= kernels
        assert ("packed_mlp", _FLOATS) not in kernels


# ---- which layers ------------------------------------------------------------------------------
def test_small_layers_stay_in_floats(shvit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FEWEST_IN_INT8_OF_TILES", "_FEWEST_IN_INT8"):
        monkeypatch.setattr(policy, name, 1 << 13)
    layers = shvit.fuse(torch.int8).precision.layers
    narrow = [x for x in layers if x.in_features * x.out_features < 1 << 13]
    assert narrow and {x.reason for x in narrow} == {f"so small that it is faster in {_FLOATS}"}
    assert "int8" in {x.dtype for x in layers if x not in narrow}


@pytest.mark.parametrize(("family", "name"), [("shvit", "head.fc"), ("inception_next", "head.fc2")])
def test_classifiers_stay_in_floats(family: str, name: str) -> None:
    fused = small(family).eval().fuse(torch.int8)
    (kept,) = (x for x in fused.precision.layers if "classifier" in x.reason)
    assert (kept.layer, kept.dtype) == (name, _FLOATS)
    if family == "shvit":
        calls = backbones.explain(fused, 64, repeats=1).calls
        layers = [call for call in calls if call.kernel in ("packed_mlp", "packed_linear")]
        assert len({call.kernel for call in layers if call.dtype == "int8"}) == 2
        assert [call.layer for call in layers if call.dtype != "int8"] == [name]


def test_feed_forwards_with_a_response_norm() -> None:
    """In int8 from 64 channels on."""
    layers = randomise(small("unireplknet")).eval().fuse(torch.int8).precision.layers
    first, second = ([x for x in layers if f"stages.{i}." in x.layer] for i in (0, 1))
    fcs = [x for x in first if x.layer[-3:] in ("fc1", "fc2")]
    assert {(x.dtype, x.reason) for x in fcs} == {(_FLOATS, _OWN_KERNEL)}
    assert any(x.dtype == "int8" and x.out_features == 320 for x in second)


def test_feed_forwards_with_a_depthwise_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """In int8 from a number of channels on, in the kernel in floats below it."""
    for name in ("_FEWEST_OF_DEPTHWISE", "_FEWEST_OF_DEPTHWISE_IN_TILES"):
        monkeypatch.setattr(policy, name, 64)
    model = backbones.create_model("van_b0", dims=(32, 32, 64, 64), depths=(1, 1, 1, 1)).eval()
    fused = model.fuse(torch.int8)
    fcs = [x for x in fused.precision.layers if x.layer[-3:] in ("fc1", "fc2")]
    narrow = [x for x in fcs if "stages.0" in x.layer or "stages.1" in x.layer]
    assert len(narrow) == len(fcs) / 2 == 4 and {x.reason for x in narrow} == {_OWN_KERNEL}
    assert {x.dtype for x in fcs if x not in narrow} == {"int8"}
    calls = backbones.explain(fused, 64, repeats=1).calls
    assert [c.kernel for c in calls].count("depthwise_mlp") == 2


def test_layers_in_floats_are_named() -> None:
    """A classifier, and layers that a kernel of their block computes or another weight."""
    model = _of_timm("mobilenetv3")[0]
    with torch.no_grad():
        model.conv_head.weight[0, 0] = float("nan")
    fused = _fused(model)
    reasons = {layer.layer: layer.reason for layer in fused.precision.layers}
    assert "classifier" in reasons["classifier"] and "window" in reasons["conv_stem"]
    assert reasons["conv_head"] == "NaN or infinities in its weight"
    narrow = [n for n, reason in reasons.items() if reason == _OWN_KERNEL]
    assert narrow and not any(hasattr(fused.get_submodule(n), "quantization") for n in narrow)
    standardised: Any = backbones.fuse(timm.create_model("resnetv2_50x1_bit").eval(), torch.int8)
    assert standardised.precision.quantized == []


def test_weights_that_other_modules_multiply() -> None:
    """BEiT's attention calls no module for its queries, keys and values."""
    model: Any = timm.models.beit.Beit(
        img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2
    ).eval()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "classifier": "head"}
    nn.init.normal_(model.blocks[0].attn.qkv.weight)
    x = torch.randn(2, 3, 32, 32)
    fused = _fused(model)
    assert "blocks.0.attn.qkv" in fused.precision.quantized
    assert _error(_run(fused, x), _run(model, x)) < 0.1
    layers = _fused(model, calibrate=x).precision.layers
    (entry,) = (e for e in layers if e.layer == "blocks.0.attn.qkv")
    assert entry.reason.startswith("not called")


def test_a_budget_keeps_sensitive_layers_in_floats(shvit: Any) -> None:
    batches = [(images(2, 3, 64, 64), torch.zeros(2)), (images(*_SIZE), torch.zeros(1))]
    whole = _fused(shvit, calibrate=batches, max_drop=1e6).precision
    others = [x for x in whole.layers if x.dtype != "int8" and x.layer != "head.fc"]
    assert whole.quantized and {x.reason for x in others} <= {_OWN_KERNEL}
    assert whole.calibrated and whole.drop > 0
    budget = whole.drop / 3
    some = _fused(shvit, calibrate=batches, max_drop=budget).precision
    kept = [layer for layer in some.layers if layer.reason.startswith("sensitive")]
    assert 0 < len(kept) < len(some.layers) and some.drop <= budget
    assert min(x.drop for x in kept) >= max(x.drop for x in some.layers if x.dtype == "int8")
    title, *_, first, _ = str(some).split("\n", 5)
    assert f"{len(some.quantized)} of {len(some.layers)} layers in int8" in title
    assert max(kept, key=lambda x: x.drop).layer == first.split()[0]  # the most sensitive one
    assert f"the drop exceeds {budget:g}" in first
    none = _fused(shvit, max_drop=1e-9)  # measuring leaves no trace
    assert not none.precision.quantized and not none.precision.calibrated
    assert none.precision.drop == 0 and torch.equal(_run(none), _run(shvit.fuse(_MAPS)))


def test_networks_that_do_not_say_their_size() -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model("resnet18", weights=None).eval()
    x = torch.randn(1, 3, 48, 48)
    for calibrate in (None, x):
        fused = _fused(model, calibrate=calibrate)
        assert len(fused.precision.quantized) == 19  # all but the first and the last one
        assert _error(_run(fused, x), _run(model, x)) < 0.05
    with pytest.raises(ValueError, match=r"max_drop needs calibrate=…: ResNet does not say which"):
        _fused(model, max_drop=0.1)
    assert 0 < _fused(model, calibrate=x, max_drop=0.01).precision.drop <= 0.01
    with pytest.raises(ValueError, match=r"ResNet does not accept \(1, 1, 64, 64\) of torch.fl"):
        _fused(model, calibrate=torch.zeros(1, 1, 64, 64))
    grey = timm.create_model("test_resnet", in_chans=1, output_stride=8).eval()
    assert _fused(grey).precision.quantized


def test_parts_of_a_network_that_is_not_recorded() -> None:
    model, x = Branching().eval(), torch.rand(1, 3, 64, 64)
    fused = _fused(model, calibrate=x)
    assert "body.layer1.0.conv1" in fused.precision.quantized
    for _ in range(2):  # the whole, then its parts
        assert 1e-4 < _error(_run(fused, x), _run(model, x)) < 0.05
    assert not fused.is_replayed and fused.body.is_replayed


# ---- afterwards --------------------------------------------------------------------------------
@torch.inference_mode()
def test_copies_files_and_changes(sample: tuple[Any, Tensor], tmp_path: Path) -> None:
    """They compute exactly the same; a changed weight is quantised again, and ranges stay."""
    model, x = sample
    fused, floats = _fused(model, calibrate=x), backbones.fuse(copy.deepcopy(model), _MAPS)
    assert fused.state_dict().keys() == floats.state_dict().keys()
    expected, told = _run(fused, x), str(fused.precision)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(_run(other, x), expected) and str(other.precision) == told
    save_file(fused.int8_state_dict(), tmp_path / "int8.safetensors")
    save_file(floats.state_dict(), tmp_path / "floats.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("int8", "floats")]
    assert sizes[0] < 0.75 * sizes[1]
    loaded = _halved(copy.deepcopy(model))
    backbones.load_checkpoint(loaded, tmp_path / "int8.safetensors")
    assert loaded.precision.quantized == fused.precision.quantized and loaded.precision.calibrated
    assert torch.equal(_run(loaded, x), expected)
    weight = fused.get_submodule(fused.precision.quantized[0]).weight
    weight.mul_(-1)
    changed = _run(fused, x)
    assert not torch.equal(changed, expected)
    assert torch.equal(changed, _run(copy.deepcopy(fused), x))  # which keeps nothing derived
    fused.load_state_dict(floats.state_dict())
    for _ in range(2):  # after several changes, some calls run as before
        again = _run(fused, x)
    assert torch.equal(again, expected)


@torch.inference_mode()
def test_fusing_again(sample: tuple[Any, Tensor]) -> None:
    """Without a dtype, layers and ranges stay; with another one, the network computes in that."""
    model, x = sample
    fused = _fused(model, calibrate=x)
    assert not fused.is_replayed  # nothing is kept of the image that confirms the layers
    before, told, quantized = _run(fused, x), str(fused.precision), fused.precision.quantized
    assert torch.equal(_run(backbones.fuse(fused), x), before) and str(fused.precision) == told
    assert torch.equal(_run(backbones.fuse(fused, torch.int8), x), before)
    assert fused.precision.calibrated and fused.precision.quantized == quantized
    floats = backbones.fuse(copy.deepcopy(model), _MAPS)
    assert torch.equal(_run(backbones.fuse(fused, _MAPS), x), _run(floats, x))
    assert fused.precision is None
    assert not backbones.fuse(fused, torch.int8).precision.calibrated
    backbones.fuse(fused, torch.int8, calibrate=x, max_drop=1.0)
    assert fused.precision.drop > 0 and fused.precision.quantized == quantized


@torch.inference_mode()
@pytest.mark.parametrize("calibrated", [False, True])
def test_layers_left_out_keep_their_reasons(calibrated: bool) -> None:
    """When it is fused again, however that was told, and not after other weights are loaded."""
    x = images(*_SIZE)
    fused = _fused(randomise(small("unireplknet")).eval(), calibrate=x if calibrated else None)
    told = str(fused.precision)
    assert _OWN_KERNEL in told
    for _ in range(2):
        assert str(backbones.fuse(fused, torch.int8).precision) == told
    backbones.load_checkpoint(fused, fused.int8_state_dict())
    assert _OWN_KERNEL not in str(fused.precision)
    assert "not quantised in the file" in str(fused.precision)


# ---- calibration -------------------------------------------------------------------------------
def test_ranges_leave_out_rare_values() -> None:
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    x[0] = 40.0
    scale, zero = quantization._range_of(x)
    assert scale * 255 < 0.6 * (x.max() - x.min()) and zero == round(zero)
    # The same at the other end, where the zero is.
    mirrored, other = quantization._range_of(-x)
    assert mirrored == pytest.approx(scale, rel=0.1) and other == pytest.approx(255 - zero, rel=0.1)
    assert quantization._range_of(torch.zeros(5)) == (0.0, 0.0)


def test_samples_include_the_extremes() -> None:
    """Of inputs so many that only every fourth is looked at; here, the others are zeros."""
    layer, x = nn.Linear(64, 2), torch.zeros(1024, 64)
    x[0, 1], x[0, 2] = 5.0, -3.0
    (found,) = quantization._ranges(layer, [("", layer)], [Call((x,), {})]).values()
    assert found == (pytest.approx(8 / 255), pytest.approx(3 / 8 * 255, abs=0.5))


def _with_a_pixel(value: float) -> Tensor:
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    return x


_SMALL = torch.zeros(1, 3, 8, 8)
_NAN, _INF = float("nan"), float("inf")
_INT8 = {"dtype": torch.int8}
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"calibrate": "a", **_INT8}, "what the model's call takes, or batches of it, got a s"),
    ({"calibrate": 1, **_INT8}, "or batches of it, got a int"),
    ({"calibrate": [], **_INT8}, "at least one batch, got none"),
    ({"calibrate": [_SMALL[0]], **_INT8}, r"SHViT does not accept \(3, 8, 8\) of torch.float32"),
    ({"calibrate": [_SMALL[:, :1]], **_INT8}, r"does not accept \(1, 1, 8, 8\) of torch.float32"),
    ({"calibrate": [_SMALL.to(torch.uint8)], **_INT8}, r"not accept \(1, 3, 8, 8\) of torch.uint8"),
    ({"calibrate": [_SMALL[:0]], **_INT8}, r"no values that SHViT could take, got \(0, 3, 8, 8\)"),
    ({"calibrate": [{"image": 1}], **_INT8}, "batch 0 has no values .* got {'image': 1}"),
    ({"calibrate": {"image": _SMALL}, **_INT8}, r"not accept {'image': \(1, 3, 8, 8\) of tor"),
    ({"calibrate": _SMALL.to("meta"), **_INT8}, r"plain values \(torch.strided on meta\)"),
    ({"calibrate": [_SMALL, _with_a_pixel(_NAN)], **_INT8}, "batch 1 has NaN or values inf"),
    ({"calibrate": [_with_a_pixel(1e300)], **_INT8}, "values infinite in torch.float32"),
    ({"calibrate": [_SMALL]}, "calibrate is for dtype=torch.int8, but dtype"),
    ({"max_drop": 0.1}, "max_drop is for dtype=torch.int8, but dtype is None"),
    ({"max_drop": 0, **_INT8}, "max_drop must be a positive number or None, got 0"),
    ({"max_drop": "a", **_INT8}, "max_drop must be a positive number or None"),
    ({"channels_last": False, **_INT8}, "torch.int8 needs channels_last"),
    ({"dtype": torch.int16}, "torch.int8 or 'auto'; got torch.int16"),
]


def test_refused_calls_leave_the_model_alone(shvit: Any) -> None:
    for arguments, message in BAD_CALLS:
        with pytest.raises(ValueError, match=message):
            backbones.fuse(shvit, **arguments)
    assert _run(shvit).dtype == torch.float32
    with torch.no_grad():
        next(shvit.parameters()).fill_(torch.nan)
    # No layer would be in int8, without a word.
    with pytest.raises(ValueError, match="gives no layer inputs that are finite"):
        shvit.fuse(torch.int8, calibrate=images(*_SIZE))


# ---- files -------------------------------------------------------------------------------------
def test_a_file_without_ranges(calibrated: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "int8.safetensors")
    found = load_file(tmp_path / "int8.safetensors")
    assert {t.dtype for t in found.values()} == {torch.int8, torch.int64, torch.float32, _MAPS}
    for layer in calibrated.precision.quantized:
        found.pop(f"{layer}.input_range")
    del found["int8_format"]  # as of an earlier version
    loaded = _halved(small("shvit"))
    backbones.load_checkpoint(loaded, found)
    assert not loaded.precision.calibrated
    assert loaded.precision.quantized == calibrated.precision.quantized


@pytest.mark.parametrize("fused", [False, True])
def test_layers_left_in_floats_stay_there(fused: bool, shvit: Any) -> None:
    """Also where more of its own were in int8."""
    with pytest.raises(RuntimeError, match=r"call fuse\(dtype=torch.int8\) first"):
        backbones.fuse(copy.deepcopy(shvit)).int8_state_dict()
    options: Any = {"max_drop": 0.001} if fused else {"max_drop": 0.01, "calibrate": images(*_SIZE)}
    model = shvit.fuse(torch.int8, **options)
    assert 0 < len(model.precision.quantized) < len(model.precision.layers)
    loaded = _halved(small("shvit"))
    if fused:
        assert len(loaded.fuse(torch.int8).precision.quantized) > len(model.precision.quantized)
    backbones.load_checkpoint(loaded, model.int8_state_dict())
    assert loaded.precision.quantized == model.precision.quantized
    assert fused or "not quantised in the file" in str(loaded.precision)
    assert torch.equal(_run(loaded), _run(model))


@torch.inference_mode()
def test_other_heads(calibrated: Any, state: dict[str, Tensor]) -> None:
    model = small("shvit", num_classes=3).eval()
    report = backbones.load_checkpoint(model, state)
    assert any(name.startswith("head.") for name in report.reinitialised)
    assert _run(model).shape == (1, 3)
    features, x = small("shvit", features_only=True).eval(), images(*_SIZE).to(_MAPS)
    backbones.load_checkpoint(features, state)
    expected = calibrated.forward_intermediates(x, intermediates_only=True)
    for got, wanted in zip(features(x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_a_cpu_without_int8_products(
    calibrated: Any, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes with the same weights in float32."""
    monkeypatch.setattr(quantization, "not_faster_in_int8", lambda device: "no such CPU")
    loaded = _halved(small("shvit"))
    backbones.load_checkpoint(loaded, state)
    assert loaded.precision.quantized == []
    assert _error(_run(loaded), _run(calibrated)) < 0.1


_DENORMAL = 2**-149  # of float32


@pytest.mark.parametrize(
    ("name", "place", "values", "said"),
    [
        ("weight_scale", 3, (0.0, _DENORMAL, -1.0, _INF, _NAN), "finite .*, but is {:g} for out"),
        ("input_range", 0, (0.0, _DENORMAL, -0.5, _INF, _NAN), "its scale must be finite .* {:g}"),
        ("input_range", 1, (-1.0, 0.5, 256.0, _INF, _NAN), "whole number from 0 to 255, got {:g}"),
        ("weight_scale", ..., (None,), "is of torch.int8"),
        ("weight_scale", ..., (torch.ones(2),), r"must be \(\d+,\) of float32"),
        ("input_range", ..., (torch.ones(3),), r"must be \(2,\) of float32"),
    ],
)
def test_numbers_that_no_layer_has(
    name: str, place: Any, values: Any, said: str, state: dict[str, Tensor], calibrated: Any
) -> None:
    """They would give every image the same answer, or NaN."""
    key = f"{calibrated.precision.quantized[1]}.{name}"
    for value in values:
        if place is ...:
            del state[key]
            state |= {} if value is None else {key: value}
        else:
            state[key][place] = value
        model = small("shvit").eval()
        with pytest.raises(backbones.CheckpointError, match=said.format(value)) as raised:
            backbones.load_checkpoint(model, state)
        assert calibrated.precision.quantized[1] in str(raised.value) and not model.fused


@pytest.mark.parametrize("version", [2, 1.5, [1], _NAN])
def test_files_of_another_format(version: Any, state: dict[str, Tensor]) -> None:
    assert state["int8_format"].item() == 1
    state["int8_format"] = torch.tensor(version)
    with pytest.raises(ValueError, match=r"state dict has format .*, this version reads 1: use"):
        backbones.load_checkpoint(small("shvit"), state)


@torch.inference_mode()
def test_outputs_without_weights() -> None:
    """Their scale is 0, which isn't wrong for them."""
    model = randomise(small("shvit")).eval().fuse(channels_last=False)
    name = "stages.1.downsample.2.expand"
    model.get_submodule(name).weight[5] = 0
    state = model.fuse(torch.int8, calibrate=images(*_SIZE)).int8_state_dict()
    assert state[f"{name}.weight_scale"][5] == 0
    loaded = _halved(small("shvit"))
    backbones.load_checkpoint(loaded, state)
    assert torch.equal(_run(loaded), _run(model))


# ---- nothing to quantise -----------------------------------------------------------------------
class Standardised(nn.Module):
    """A network whose layers lend their weights to others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.a.weight / self.a.weight.std(), self.a.bias)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (Standardised(), (1, 3, 8, 8), r"Standardised can compute in int8: a \(.*\), b \(not"),
        (nn.Conv3d(1, 2, 3), (1, 1, 5, 5, 5), "Conv3d can compute in int8: it has no linear lay"),
        (nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]), (2, 4), r"small .*\) and 2 more; "),
    ],
)
@pytest.mark.parametrize("max_drop", [None, 1])
def test_nothing_to_quantise(
    model: nn.Module,
    shape: tuple[int, ...],
    said: str,
    max_drop: float | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The model computes in floats, and one message says why."""
    if isinstance(model, nn.Sequential):
        monkeypatch.setattr(policy, "pays_in_int8", lambda *_: False)
    x = torch.randn(shape)
    fused = _fused(model, calibrate=x, max_drop=max_drop)
    assert not fused.precision.quantized and fused.precision.reason in str(fused.precision)
    (record,) = caplog.records
    assert record.message == f"{fused.precision.reason}; it computes in {_FLOATS}"
    assert re.search(said, record.message)
    assert _error(fused(x), model(x)) < 0.02
