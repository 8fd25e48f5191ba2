"""``fuse(torch.int8)`` of our families: accuracy, layers, calibration, state dicts and files."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import FAMILIES, RESTORATION, images, randomise, small

import backbones
from backbones.fusing import quantization
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


def _error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.norm()).item()


def _images(*shape: int) -> Tensor:
    return images(*(shape or _SIZE)).to(_MAPS)


def _other_weights(family: str, **options: Any) -> Any:
    model = small(family, **options).eval()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def plain(small_layers_too: None) -> Any:
    """For small images, also where there are none and some are drawn."""
    return randomise(small("shvit", pretrained_cfg_overlay={"input_size": _SIZE[1:]})).eval()


@pytest.fixture
def shvit(plain: Any) -> Any:
    return copy.deepcopy(plain)


@pytest.fixture(scope="module")
def calibrated(plain: Any) -> Any:
    return copy.deepcopy(plain).fuse(torch.int8, calibrate=images(*_SIZE))


@pytest.fixture
def state(calibrated: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in calibrated.int8_state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family(family: str) -> None:
    """Close to float32, replayed, and the same in copies, pickles and from a state dict."""
    model = randomise(small(family)).eval()
    side = 24 if family in RESTORATION else 64  # of three windows, or of several
    x = images(2, 3, side, side)
    expected, limit = model(x), 0.02 if family in RESTORATION else 0.1
    for calibrate in (None, [x]):
        fused = copy.deepcopy(model).fuse(torch.int8, calibrate=calibrate)
        assert next(fused.parameters()).dtype == _MAPS
        outputs = [fused(x.to(_MAPS)) for _ in range(3)]
        assert fused.is_replayed and torch.equal(outputs[0], outputs[2])
        assert _error(outputs[0], expected) < limit
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(x.to(_MAPS)), outputs[0])
        assert str(copied.precision) == str(fused.precision)
    loaded = _other_weights(family)
    backbones.load_checkpoint(loaded, fused.int8_state_dict())
    assert loaded.precision.quantized == fused.precision.quantized and loaded.precision.calibrated
    assert torch.equal(loaded(x.to(_MAPS)), outputs[0])


# ---- which layers ------------------------------------------------------------------------------
@pytest.mark.parametrize(("tiles", "fewest"), [(True, 1 << 15), (False, 1 << 13)])
def test_small_layers_stay_in_floats(
    tiles: bool, fewest: int, shvit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_FEWEST_IN_INT8_OF_TILES" if tiles else "_FEWEST_IN_INT8"
    monkeypatch.setattr(policy, name, fewest)
    monkeypatch.setattr(policy, "by_tiles", lambda dtype: tiles)
    layers = shvit.fuse(torch.int8).precision.layers
    narrow = [x for x in layers if x.in_features * x.out_features < fewest]
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


@torch.inference_mode()
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


def test_layers_that_cannot_be_quantised_are_named(shvit: Any) -> None:
    with torch.no_grad():
        shvit.head.fc.linear.weight[0, 0] = float("nan")
    entry = shvit.fuse(torch.int8).precision.layers[-1]
    assert entry.layer.startswith("head") and entry.dtype != "int8"
    assert entry.reason == "NaN or infinities in its weight"


def test_a_budget_keeps_sensitive_layers_in_floats(shvit: Any) -> None:
    batches = [(images(2, 3, 64, 64), torch.zeros(2)), (images(*_SIZE), torch.zeros(1))]
    whole = copy.deepcopy(shvit).fuse(torch.int8, calibrate=batches, max_drop=1e6).precision
    others = [x for x in whole.layers if x.dtype != "int8" and x.layer != "head.fc"]
    assert whole.quantized and {x.reason for x in others} <= {_OWN_KERNEL}
    assert whole.calibrated and whole.drop > 0
    budget = whole.drop / 3
    some = copy.deepcopy(shvit).fuse(torch.int8, calibrate=batches, max_drop=budget).precision
    kept = [layer for layer in some.layers if layer.reason.startswith("sensitive")]
    assert 0 < len(kept) < len(some.layers) and some.drop <= budget
    assert min(x.drop for x in kept) >= max(x.drop for x in some.layers if x.dtype == "int8")
    table = str(some)
    assert f"{len(some.quantized)} of {len(some.layers)} layers in int8" in table
    assert f"the drop exceeds {budget:g}" in table
    none = shvit.fuse(torch.int8, max_drop=1e-9).precision
    assert not none.quantized and not none.calibrated and none.drop == 0


# ---- afterwards --------------------------------------------------------------------------------
@torch.inference_mode()
def test_changed_weights(shvit: Any) -> None:
    """State dicts are those of the fused model; a new weight is quantised again."""
    fused, floats = copy.deepcopy(shvit).fuse(torch.int8), shvit.fuse(_MAPS)
    assert fused.state_dict().keys() == floats.state_dict().keys()
    x = _images()
    before = [fused(x) for _ in range(3)][-1]
    fused.head.fc.weight.mul_(2)
    fused.head.fc.bias.mul_(2)
    torch.testing.assert_close(fused(x), 2 * before, rtol=2**-7, atol=0)
    fused.load_state_dict(floats.state_dict())
    assert torch.equal(fused(x), before)
    weight = fused.get_submodule(fused.precision.quantized[0]).weight
    weight.mul_(-1)
    assert not torch.equal(fused(x), before)
    weight.mul_(-1)
    assert torch.equal(fused(x), before)
    fused.reset_classifier(3)
    assert all(fused(x).shape == (1, 3) and fused(x).dtype == _MAPS for _ in range(3))


@torch.inference_mode()
def test_fusing_again(calibrated: Any, shvit: Any) -> None:
    """Without a dtype, layers and ranges stay; with another one, the model computes in that."""
    model, x = copy.deepcopy(calibrated), _images()
    before, told = model(x), str(model.precision)
    assert torch.equal(model.fuse()(x), before) and str(model.precision) == told
    assert torch.equal(model.fuse(torch.int8)(x), before) and model.precision.calibrated
    assert torch.equal(model.fuse(_MAPS)(x), shvit.fuse(_MAPS)(x)) and model.precision is None
    assert not model.fuse(torch.int8).precision.calibrated


@torch.inference_mode()
def test_measuring_leaves_the_model_alone(shvit: Any) -> None:
    x, folded = images(*_SIZE), shvit.fuse(channels_last=False)
    before, state = folded(x), copy.deepcopy(folded.state_dict())
    quantization.quantize(folded, [x], 1e-6)
    quantization.unquantize(folded)
    assert torch.equal(folded(x), before)
    assert all(torch.equal(t, state[name]) for name, t in folded.state_dict().items())


@torch.inference_mode()
def test_nothing_is_kept_of_the_images_that_confirm_it(shvit: Any) -> None:
    """Layers that no kernel computes in int8 are found by a call, which is not replayed later."""
    fused = shvit.fuse(torch.int8)
    assert not fused.is_replayed
    x = _images()
    assert torch.equal(fused(x), fused(x)) and fused.is_replayed


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
    (found,) = quantization._calibrate(layer, [("", layer)], [x]).values()
    assert found == (pytest.approx(8 / 255), pytest.approx(3 / 8 * 255, abs=0.5))


def _with_a_pixel(value: float) -> Tensor:
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    return x


_SMALL = torch.zeros(1, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ("a", "calibrate must give batches of images, got a s"),
        ([], "at least one batch of images, got none"),
        ([_SMALL[0]], r"\(B, 3, H, W\), got \(3, 8, 8\)"),
        ([_SMALL[:, :1]], r"\(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        ([_SMALL.to(torch.uint8)], "batches of images"),
        ([{"image": 1}], "got dict"),
        (_SMALL.to("meta"), r"without plain values \(torch.strided on meta\)"),
        ([_SMALL.to_sparse()], r"without plain values \(torch.sparse_coo on cpu\)"),
        (
            [torch.nested.nested_tensor([_SMALL[0]], layout=torch.jagged)],
            r"without plain values \(nested\)",
        ),
        ([_SMALL, _with_a_pixel(float("nan"))], "batch 1 has NaN or values inf"),
        ([_with_a_pixel(float("-inf"))], "batch 0 has NaN or values infinite in torch.float32"),
        ([_with_a_pixel(1e300)], "batch 0 has NaN or values infinite in torch.float32"),
    ],
)
def test_bad_batches(batches: Any, message: str, shvit: Any) -> None:
    with pytest.raises(ValueError, match=message):
        shvit.fuse(torch.int8, calibrate=batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibrate": [_SMALL]}, "calibrate is for dtype=torch.int8, but dtype"),
        ({"max_drop": 0.1}, "max_drop is for dtype=torch.int8, but dtype is None"),
        ({"dtype": torch.int8, "max_drop": 0}, "max_drop must be a positive number or None, got 0"),
        ({"dtype": torch.int8, "max_drop": "a"}, "max_drop must be a positive number or None"),
        ({"dtype": torch.int8, "channels_last": False}, "torch.int8 needs channels_last"),
        ({"dtype": torch.int16}, "or torch.int8; got torch.int16"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, shvit: Any) -> None:
    with pytest.raises(ValueError, match=message):
        backbones.fuse(shvit, **arguments)


def test_a_calibration_without_ranges(shvit: Any) -> None:
    """No layer would be in int8, without a word."""
    with torch.no_grad():
        next(shvit.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="gives no layer inputs that are finite"):
        shvit.fuse(torch.int8, calibrate=images(*_SIZE))


# ---- files -------------------------------------------------------------------------------------
@torch.inference_mode()
def test_a_file(calibrated: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    """It is smaller than with floats, and its layers keep their places, without ranges too."""
    save_file(state, tmp_path / "int8.safetensors")
    save_file(calibrated.state_dict(), tmp_path / "floats.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("int8", "floats")]
    assert sizes[0] < 0.75 * sizes[1]
    found = load_file(tmp_path / "int8.safetensors")
    assert {t.dtype for t in found.values()} == {torch.int8, torch.float32, _MAPS}
    for layer in calibrated.precision.quantized:
        found.pop(f"{layer}.input_range")
    loaded = _other_weights("shvit")
    backbones.load_checkpoint(loaded, found)
    assert not loaded.precision.calibrated
    assert loaded.precision.quantized == calibrated.precision.quantized


@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_layers_left_in_floats_stay_there(fused: bool, shvit: Any) -> None:
    """Also where more of its own were in int8."""
    options: Any = {"max_drop": 0.001} if fused else {"max_drop": 0.01, "calibrate": images(*_SIZE)}
    model = shvit.fuse(torch.int8, **options)
    assert 0 < len(model.precision.quantized) < len(model.precision.layers)
    loaded = _other_weights("shvit")
    if fused:
        assert len(loaded.fuse(torch.int8).precision.quantized) > len(model.precision.quantized)
    backbones.load_checkpoint(loaded, model.int8_state_dict())
    assert loaded.precision.quantized == model.precision.quantized
    assert fused or "not quantised in the file" in str(loaded.precision)
    assert torch.equal(loaded(_images()), model(_images()))


@torch.inference_mode()
def test_other_heads(calibrated: Any, state: dict[str, Tensor]) -> None:
    model = small("shvit", num_classes=3).eval()
    report = backbones.load_checkpoint(model, state)
    assert any(name.startswith("head.") for name in report.reinitialised)
    assert model(_images()).shape == (1, 3)
    features = small("shvit", features_only=True).eval()
    backbones.load_checkpoint(features, state)
    expected = calibrated.forward_intermediates(_images(), intermediates_only=True)
    for got, wanted in zip(features(_images()), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_a_cpu_without_int8_products(
    calibrated: Any, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes with the same weights in float32."""
    monkeypatch.setattr(quantization, "not_faster_in_int8", lambda device: "no such CPU")
    loaded = _other_weights("shvit")
    backbones.load_checkpoint(loaded, state)
    assert loaded.precision.quantized == []
    with torch.inference_mode():
        assert _error(loaded(images(*_SIZE)), calibrated(_images())) < 0.1


_NAN, _INF, _DENORMAL = float("nan"), float("inf"), 2**-149
_NUMBERS = {
    "weight_scale must be finite .*, but is {:g} for output 3": (0.0, _DENORMAL, -1.0, _INF, _NAN),
    "input_range: its scale must be finite .*, got {:g}": (0.0, _DENORMAL, -0.5, _INF, _NAN),
    "input_range: its zero point must be a whole number from 0 to 255, got {:g}": (
        *(-1.0, 0.5, 256.0, _INF, _NAN),
    ),
}


@pytest.mark.parametrize(("said", "value"), [(s, x) for s, v in _NUMBERS.items() for x in v])
def test_numbers_that_no_layer_has(
    state: dict[str, Tensor], calibrated: Any, said: str, value: float
) -> None:
    """They would give every image the same answer, or NaN."""
    layer = calibrated.precision.quantized[1]
    name = "weight_scale" if said.startswith("weight") else "input_range"
    state[f"{layer}.{name}"][3 if name == "weight_scale" else int("zero" in said)] = value
    _refused(state, re.escape(layer) + rf"\.{said.format(value)}")


@pytest.mark.parametrize(
    ("name", "numbers", "said"),
    [
        ("weight_scale", None, "is of torch.int8"),
        ("weight_scale", torch.ones(2), r"weight_scale must be \(\d+,\) of float32"),
        ("input_range", torch.ones(3), r"input_range must be \(2,\) of float32"),
    ],
)
def test_wrong_numbers(
    state: dict[str, Tensor], calibrated: Any, name: str, numbers: Tensor | None, said: str
) -> None:
    key = f"{calibrated.precision.quantized[0]}.{name}"
    del state[key]
    _refused(state if numbers is None else {**state, key: numbers}, said)


def _refused(state: dict[str, Tensor], said: str) -> None:
    model = small("shvit").eval()
    with pytest.raises(backbones.CheckpointError, match=said):
        backbones.load_checkpoint(model, state)
    assert not model.fused


@torch.inference_mode()
def test_outputs_without_weights() -> None:
    """Their scale is 0, which isn't wrong for them."""
    model = randomise(small("shvit")).eval().fuse(channels_last=False)
    name = "stages.1.downsample.2.expand"
    model.get_submodule(name).weight[5] = 0
    state = model.fuse(torch.int8, calibrate=images(*_SIZE)).int8_state_dict()
    assert state[f"{name}.weight_scale"][5] == 0
    loaded = _other_weights("shvit")
    backbones.load_checkpoint(loaded, state)
    assert torch.equal(loaded(_images()), model(_images()))


def test_models_in_floats_have_none() -> None:
    with pytest.raises(RuntimeError, match=r"call fuse\(dtype=torch.int8\) first"):
        small("shvit").eval().fuse().int8_state_dict()
