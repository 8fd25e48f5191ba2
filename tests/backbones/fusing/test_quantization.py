"""``fuse(torch.int8)``: accuracy, calibration, choice of layers, copies, changes, other CPUs."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from compiled_kernels import without_kernels
from torch import Tensor, nn
from zoo import FAMILIES, RESTORATION, images, randomise, small

import backbones
from backbones.fusing import quantization
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

_REASON = not_faster_in_int8(torch.device("cpu"))
_needs_bytes = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")
_MAPS = policy.maps_of_int8()
pytestmark = pytest.mark.usefixtures("small_layers_too")


def _error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.norm()).item()


def _images(*shape: int) -> Tensor:
    return images(*shape).to(_MAPS)


@pytest.fixture(scope="module")
def shvit(small_layers_too: None) -> nn.Module:
    """For small images, also where there are none and some are drawn."""
    overlay = {"input_size": (3, 64, 64)}
    return randomise(small("shvit", pretrained_cfg_overlay=overlay)).eval()


@_needs_bytes
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family(family: str) -> None:
    """Close to the float32 model, replayed, and the same in copies."""
    model = randomise(small(family)).eval()
    side = 24 if family in RESTORATION else 64  # of three windows, or of several
    size = (2, 3, side, side)
    expected = model(images(*size))
    limit = 0.02 if family in RESTORATION else 0.1
    for calibrate in (None, [images(*size)]):
        fused = backbones.fuse(copy.deepcopy(model), torch.int8, calibrate=calibrate)
        assert next(fused.parameters()).dtype == _MAPS
        outputs = [fused(_images(*size)) for _ in range(3)]
        assert fused.is_replayed and torch.equal(outputs[0], outputs[2])
        assert _error(outputs[0], expected) < limit
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(copied(_images(*size)), outputs[0])
            assert str(copied.precision) == str(fused.precision)


@_needs_bytes
@pytest.mark.parametrize(("tiles", "fewest"), [(True, 1 << 15), (False, 1 << 13)])
def test_small_layers_stay_in_floats(
    tiles: bool, fewest: int, shvit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_FEWEST_IN_INT8_OF_TILES" if tiles else "_FEWEST_IN_INT8"
    monkeypatch.setattr(policy, name, fewest)
    monkeypatch.setattr(policy, "by_tiles", lambda dtype: tiles)
    layers = copy.deepcopy(shvit).fuse(torch.int8).precision.layers
    small = [x for x in layers if x.in_features * x.out_features < fewest]
    dtype = str(_MAPS).removeprefix("torch.")
    assert small and {x.reason for x in small} == {f"so small that it is faster in {dtype}"}
    assert "int8" in {x.dtype for x in layers if x not in small}


@_needs_bytes
@torch.inference_mode()
def test_the_kernels_run(shvit: nn.Module) -> None:
    fused = copy.deepcopy(shvit).fuse(torch.int8)
    calls = backbones.explain(fused, 64, repeats=1).calls
    layers = [call for call in calls if call.kernel in ("packed_mlp", "packed_linear")]
    assert len({call.kernel for call in layers if call.dtype == "int8"}) == 2
    assert [call.layer for call in layers if call.dtype != "int8"] == ["head.fc"]


@_needs_bytes
@pytest.mark.parametrize(("family", "name"), [("shvit", "head.fc"), ("inception_next", "head.fc2")])
def test_classifiers_stay_in_floats(family: str, name: str) -> None:
    layers = small(family).eval().fuse(torch.int8).precision.layers
    (kept,) = (x for x in layers if "classifier" in x.reason)
    assert (kept.layer, kept.dtype) == (name, str(_MAPS).removeprefix("torch."))


@_needs_bytes
@torch.inference_mode()
def test_feed_forwards_with_a_response_norm() -> None:
    """In bytes from 64 channels on; a new weight is quantised again."""
    fused = randomise(small("unireplknet")).eval().fuse(torch.int8)
    by_stage = {i: [x for x in fused.precision.layers if f"stages.{i}." in x.layer] for i in (0, 1)}
    fcs = [[x for x in layers if x.layer[-3:] in ("fc1", "fc2")] for layers in by_stage.values()]
    assert {x.dtype for x in fcs[0]} == {str(_MAPS).removeprefix("torch.")}
    assert {x.reason for x in fcs[0]} == {"in a block with a kernel of its own"}
    assert any(x.dtype == "int8" and x.out_features == 320 for x in fcs[1])
    x, fc2 = _images(1, 3, 64, 64), dict(fused.named_modules())[fcs[1][-1].layer]
    before = fused(x)
    fc2.weight.mul_(-1)
    assert not torch.equal(fused(x), before)
    fc2.weight.mul_(-1)
    assert torch.equal(fused(x), before)


@_needs_bytes
def test_feed_forwards_with_a_depthwise_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes from a number of channels on, in the kernel in floats below it."""
    for name in ("_FEWEST_IN_INT8", "_FEWEST_IN_INT8_OF_TILES"):
        monkeypatch.setattr(policy, name, 1)
    for name in ("_FEWEST_OF_DEPTHWISE", "_FEWEST_OF_DEPTHWISE_IN_TILES"):
        monkeypatch.setattr(policy, name, 64)
    model = backbones.create_model("van_b0", dims=(32, 32, 64, 64), depths=(1, 1, 1, 1)).eval()
    fused = model.fuse(torch.int8)
    fcs = [x for x in fused.precision.layers if x.layer[-3:] in ("fc1", "fc2")]
    narrow = [x for x in fcs if "stages.0" in x.layer or "stages.1" in x.layer]
    assert len(narrow) == len(fcs) / 2 == 4
    assert {x.reason for x in narrow} == {"in a block with a kernel of its own"}
    assert {x.dtype for x in fcs if x not in narrow} == {"int8"}
    calls = backbones.explain(fused, 64, repeats=1).calls
    assert [c.kernel for c in calls].count("depthwise_mlp") == 2


@_needs_bytes
@torch.inference_mode()
def test_state_and_changed_weights(shvit: nn.Module) -> None:
    """State dicts are those of the fused model; a new weight is quantised again."""
    fused, plain = copy.deepcopy(shvit).fuse(torch.int8), copy.deepcopy(shvit).fuse(_MAPS)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x = _images(1, 3, 64, 64)
    before = [fused(x) for _ in range(3)][-1]
    fused.head.fc.weight.mul_(2)
    fused.head.fc.bias.mul_(2)
    torch.testing.assert_close(fused(x), 2 * before, rtol=2**-7, atol=0)
    fused.load_state_dict(plain.state_dict())
    assert torch.equal(fused(x), before)


@_needs_bytes
@torch.inference_mode()
def test_fusing_again(shvit: nn.Module) -> None:
    """Without a dtype, the model stays as it is; with another one, it computes in that."""
    x = _images(1, 3, 64, 64)
    fused = copy.deepcopy(shvit).fuse(torch.int8)
    before, told = fused(x), str(fused.precision)
    assert torch.equal(fused.fuse()(x), before) and str(fused.precision) == told
    expected = copy.deepcopy(shvit).fuse(_MAPS)(x)
    assert torch.equal(fused.fuse(_MAPS)(x), expected) and fused.precision is None


@_needs_bytes
def test_a_budget_keeps_sensitive_layers_in_floats(shvit: nn.Module) -> None:
    batches = [(images(2, 3, 64, 64), torch.zeros(2)), (images(1, 3, 64, 64), torch.zeros(1))]
    whole = copy.deepcopy(shvit).fuse(torch.int8, calibrate=batches, max_drop=1e6).precision
    others = [x for x in whole.layers if x.dtype != "int8" and x.layer != "head.fc"]
    assert whole.quantized and {x.reason for x in others} <= {"in a block with a kernel of its own"}
    assert whole.calibrated and whole.drop > 0
    budget = whole.drop / 3
    some = copy.deepcopy(shvit).fuse(torch.int8, calibrate=batches, max_drop=budget).precision
    kept = [layer for layer in some.layers if layer.reason.startswith("sensitive")]
    assert 0 < len(kept) < len(some.layers) and some.drop <= budget
    assert min(layer.drop for layer in kept) >= max(
        layer.drop for layer in some.layers if layer.dtype == "int8"
    )
    table = str(some)
    assert f"{len(some.quantized)} of {len(some.layers)} layers in int8" in table
    assert f"the drop exceeds {budget:g}" in table
    none = copy.deepcopy(shvit).fuse(torch.int8, max_drop=1e-9).precision
    assert not none.quantized and not none.calibrated and none.drop == 0


@_needs_bytes
@torch.inference_mode()
def test_measuring_leaves_the_model_alone(shvit: nn.Module) -> None:
    x = images(1, 3, 64, 64)
    folded = copy.deepcopy(shvit).fuse(channels_last=False)
    before, state = folded(x), copy.deepcopy(folded.state_dict())
    quantization.quantize(folded, [x], 1e-6)
    quantization.unquantize(folded)
    assert torch.equal(folded(x), before)
    assert all(torch.equal(t, state[name]) for name, t in folded.state_dict().items())


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


@_needs_bytes
@torch.inference_mode()
def test_a_new_classifier(shvit: nn.Module) -> None:
    fused = copy.deepcopy(shvit).fuse(torch.int8)
    fused.reset_classifier(3)
    for _ in range(3):
        out = fused(_images(2, 3, 64, 64))
        assert out.shape == (2, 3) and out.dtype == _MAPS


@_needs_bytes
def test_layers_that_cannot_be_quantised_are_named(shvit: nn.Module) -> None:
    broken = copy.deepcopy(shvit)
    with torch.no_grad():
        broken.head.fc.linear.weight[0, 0] = float("nan")
    entry = broken.fuse(torch.int8).precision.layers[-1]
    assert entry.layer.startswith("head") and entry.dtype != "int8"
    assert entry.reason == "NaN or infinities in its weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibrate": [torch.zeros(1, 3, 8, 8)]}, "calibrate is for dtype=torch.int8, but dtype"),
        ({"max_drop": 0.1}, "max_drop is for dtype=torch.int8, but dtype is None"),
        ({"dtype": torch.int8, "max_drop": 0}, "max_drop must be a positive number or None, got 0"),
        ({"dtype": torch.int8, "max_drop": "a"}, "max_drop must be a positive number or None"),
        ({"dtype": torch.int8, "channels_last": False}, "torch.int8 needs channels_last"),
        ({"dtype": torch.int8, "calibrate": "a"}, "calibrate must give batches of images, got a s"),
        ({"dtype": torch.int16}, "or torch.int8; got torch.int16"),
    ],
)
def test_bad_arguments(arguments, message, shvit: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        backbones.fuse(copy.deepcopy(shvit), **arguments)


def _with_a_pixel(value: float) -> Tensor:
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    return x


@_needs_bytes
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch of images, got none"),
        ([torch.zeros(3, 8, 8)], r"\(B, 3, H, W\), got \(3, 8, 8\)"),
        ([torch.zeros(1, 1, 8, 8)], r"\(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        ([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], "batches of images"),
        ([{"image": 1}], "got dict"),
        (torch.zeros(1, 3, 8, 8, device="meta"), r"without plain values \(torch.strided on meta\)"),
        (
            [torch.zeros(1, 3, 8, 8).to_sparse()],
            r"without plain values \(torch.sparse_coo on cpu\)",
        ),
        (
            [torch.nested.nested_tensor([torch.zeros(3, 8, 8)], layout=torch.jagged)],
            r"without plain values \(nested\)",
        ),
        ([torch.zeros(1, 3, 8, 8), _with_a_pixel(float("nan"))], "batch 1 has NaN or values inf"),
        ([_with_a_pixel(float("-inf"))], "batch 0 has NaN or values infinite in torch.float32"),
        ([_with_a_pixel(1e300)], "batch 0 has NaN or values infinite in torch.float32"),
    ],
)
def test_bad_batches(batches, message, shvit: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(shvit).fuse(torch.int8, calibrate=batches)


@_needs_bytes
def test_a_calibration_without_ranges(shvit: nn.Module) -> None:
    """No layer would be in int8, without a word."""
    broken = copy.deepcopy(shvit)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="gives no layer inputs that are finite"):
        broken.fuse(torch.int8, calibrate=images(1, 3, 64, 64))


@torch.inference_mode()
def test_where_it_does_not_pay(shvit: nn.Module, monkeypatch, caplog) -> None:
    """The model stays in float32, and one warning says why."""
    without_kernels(monkeypatch)
    quantization._warn_not_faster.cache_clear()
    with caplog.at_level(logging.WARNING):
        fused = [copy.deepcopy(shvit).fuse(torch.int8) for _ in range(2)][0]
    (record,) = [r for r in caplog.records if "stays in float32" in r.message]
    assert "VISION_BACKBONES_NATIVE=0" in record.message
    assert next(fused.parameters()).dtype == torch.float32
    assert fused.precision.reason and not fused.precision.quantized
    x = images(1, 3, 64, 64)
    assert torch.equal(fused(x), copy.deepcopy(shvit).fuse()(x))
