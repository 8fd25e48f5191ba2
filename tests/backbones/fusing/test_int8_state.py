"""Models in int8 through state dicts and files: the same bytes, without a second calibration."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import FAMILIES, RESTORATION, images, randomise, small

import backbones
from backbones.fusing import quantization
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

_REASON = not_faster_in_int8(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}"),
    pytest.mark.usefixtures("small_layers_too"),
]
_MAPS = policy.maps_of_int8()
_SIZE = (1, 3, 64, 64)


def _other_weights(family: str) -> Any:
    model = small(family).eval()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def shvit(small_layers_too: None) -> Any:
    return randomise(small("shvit")).eval().fuse(torch.int8, calibrate=images(*_SIZE))


@pytest.fixture
def state(shvit: Any) -> dict[str, Tensor]:
    return dict(shvit.int8_state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_comes_back(family: str) -> None:
    x = images(1, 3, 24, 24) if family in RESTORATION else images(*_SIZE)
    model = randomise(small(family)).eval().fuse(torch.int8, calibrate=x)
    loaded = _other_weights(family)
    backbones.load_checkpoint(loaded, model.int8_state_dict())
    assert loaded.precision.quantized == model.precision.quantized
    assert loaded.precision.calibrated
    assert torch.equal(loaded(x.to(_MAPS)), model(x.to(_MAPS)))


@torch.inference_mode()
def test_a_file(shvit: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    """It is smaller than with floats, and its layers keep their places, without ranges too."""
    save_file(state, tmp_path / "int8.safetensors")
    save_file(shvit.state_dict(), tmp_path / "floats.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("int8", "floats")]
    assert sizes[0] < 0.75 * sizes[1]
    found = load_file(tmp_path / "int8.safetensors")
    assert {t.dtype for t in found.values()} == {torch.int8, torch.float32, _MAPS}
    for layer in shvit.precision.quantized:
        found.pop(f"{layer}.input_range")
    loaded = _other_weights("shvit")
    backbones.load_checkpoint(loaded, found)
    assert not loaded.precision.calibrated
    assert loaded.precision.quantized == shvit.precision.quantized


@torch.inference_mode()
def test_layers_left_in_floats_stay_there() -> None:
    plain = randomise(small("shvit")).eval()
    model = copy.deepcopy(plain).fuse(torch.int8, calibrate=images(*_SIZE), max_drop=0.01)
    assert 0 < len(model.precision.quantized) < len(model.precision.layers)
    loaded = _other_weights("shvit")
    backbones.load_checkpoint(loaded, model.int8_state_dict())
    assert loaded.precision.quantized == model.precision.quantized
    assert "not quantised in the file" in str(loaded.precision)
    assert torch.equal(loaded(images(*_SIZE).to(_MAPS)), model(images(*_SIZE).to(_MAPS)))


@torch.inference_mode()
def test_a_model_in_8_bits_takes_the_layers_of_the_file() -> None:
    """Also where more of its own were in int8."""
    model = randomise(small("shvit")).eval().fuse(torch.int8, max_drop=0.001)
    target = _other_weights("shvit").fuse(torch.int8)
    assert len(target.precision.quantized) > len(model.precision.quantized)
    backbones.load_checkpoint(target, model.int8_state_dict())
    assert target.precision.quantized == model.precision.quantized
    assert torch.equal(target(images(*_SIZE).to(_MAPS)), model(images(*_SIZE).to(_MAPS)))


@torch.inference_mode()
def test_a_second_call_keeps_the_ranges(shvit: Any) -> None:
    model = copy.deepcopy(shvit)
    before = model(images(*_SIZE).to(_MAPS))
    assert torch.equal(model.fuse(torch.int8)(images(*_SIZE).to(_MAPS)), before)
    assert model.precision.calibrated
    floats = model.fuse(torch.float32)
    assert floats.precision is None
    assert not floats.fuse(torch.int8).precision.calibrated


@torch.inference_mode()
def test_another_number_of_classes(state: dict[str, Tensor]) -> None:
    model = small("shvit", num_classes=3)
    report = backbones.load_checkpoint(model.eval(), state)
    assert any(name.startswith("head.") for name in report.reinitialised)
    assert model(images(*_SIZE).to(_MAPS)).shape == (1, 3)


@torch.inference_mode()
def test_feature_maps(shvit: Any, state: dict[str, Tensor]) -> None:
    features = small("shvit", features_only=True).eval()
    backbones.load_checkpoint(features, state)
    x = images(*_SIZE).to(_MAPS)
    expected = shvit.forward_intermediates(x, intermediates_only=True)
    for got, wanted in zip(features(x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_a_cpu_without_int8_products(
    shvit: Any, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes with the same weights in float32."""
    monkeypatch.setattr(quantization, "not_faster_in_int8", lambda device: "no such CPU")
    loaded = _other_weights("shvit")
    backbones.load_checkpoint(loaded, state)
    assert loaded.precision.quantized == []
    with torch.inference_mode():
        got, expected = loaded(images(*_SIZE)), shvit(images(*_SIZE).to(_MAPS)).float()
    assert ((got - expected).norm() / expected.norm()).item() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, layer: state.pop(f"{layer}.weight_scale"), "is of torch.int8"),
        (
            lambda state, layer: state[f"{layer}.weight_scale"].resize_(2),
            r"weight_scale must be \(\d+,\) of float32",
        ),
        (
            lambda state, layer: state.update({f"{layer}.input_range": torch.ones(3)}),
            r"input_range must be \(2,\) of float32",
        ),
    ],
)
def test_wrong_numbers(state: dict[str, Tensor], shvit: Any, change: Any, message: str) -> None:
    layer = shvit.precision.quantized[0]
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state, layer)
    model = small("shvit").eval()
    with pytest.raises(backbones.CheckpointError, match=message):
        backbones.load_checkpoint(model, state)
    assert not model.fused


_NAN, _INF, _DENORMAL = float("nan"), float("inf"), 2**-149


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        *(
            ("weight_scale", x, f"weight_scale must be finite .*, but is {x:g} for output 3")
            for x in (0.0, _DENORMAL, -1.0, _INF, _NAN)
        ),
        *(
            ("scale", x, f"input_range: its scale must be finite .*, got {x:g}")
            for x in (0.0, _DENORMAL, -0.5, _INF, _NAN)
        ),
        *(
            (
                "zero",
                x,
                f"input_range: its zero point must be a whole number from 0 to 255, got {x:g}",
            )
            for x in (-1.0, 0.5, 256.0, _INF, _NAN)
        ),
    ],
)
def test_numbers_that_no_layer_has(
    state: dict[str, Tensor], shvit: Any, place: str, value: float, message: str
) -> None:
    """They would give every image the same answer, or NaN."""
    layer = shvit.precision.quantized[1]
    name, index = {
        "weight_scale": ("weight_scale", 3),
        "scale": ("input_range", 0),
        "zero": ("input_range", 1),
    }[place]
    state[f"{layer}.{name}"] = state[f"{layer}.{name}"].clone()
    state[f"{layer}.{name}"][index] = value
    model = small("shvit").eval()
    with pytest.raises(backbones.CheckpointError, match=re.escape(layer) + rf"\.{message}"):
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
    assert torch.equal(loaded(images(*_SIZE).to(_MAPS)), model(images(*_SIZE).to(_MAPS)))


def test_models_in_floats_have_none() -> None:
    with pytest.raises(RuntimeError, match=r"call fuse\(dtype=torch.int8\) first"):
        small("shvit").eval().fuse().int8_state_dict()
