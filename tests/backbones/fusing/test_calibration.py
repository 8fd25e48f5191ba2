"""``calibrate``: all that a model's call takes, and batches of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm_models import vit_of_transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from backbones.fusing import quantization
from backbones.fusing.calibration import Call, readings


class Tokens(nn.Module):
    """Of any number of axes; some may be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Any, mask: Any = None) -> Any:
        return self.fc(x if mask is None else x.masked_fill(mask, 0))


class Pair(Tokens):
    def forward(self, x: Any, y: Any, *, twice: bool = False) -> Any:  # type: ignore[override]
        return self.fc(input=torch.cat((x, y)) * (1 + twice))


class Detector(Tokens):
    """Of images of several sizes."""

    def forward(self, images: Any, targets: Any = None) -> Any:  # type: ignore[override]
        assert isinstance(images, list | tuple) and all(i.ndim == 3 for i in images)
        return [self.fc(image) for image in images]


class Pyramid(Tokens):
    def forward(self, maps: Any) -> Any:  # type: ignore[override]
        return {level: self.fc(x) for level, x in maps.items()}


class Any_(Tokens):
    """That tells nothing of its arguments, as wrappers do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(*args, **kwargs)


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.conv(x).mean((2, 3, 4)))


def _calibrated(model: nn.Module, calibrate: Any) -> list[Call]:
    """The calls that all linear layers get a range from."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    ranges, calls = quantization._calibrate(model.eval(), layers, calibrate)
    assert ranges.keys() == {name for name, _ in layers}
    return calls


X, Y, LABELS = torch.randn(2, 5, 8), torch.randn(2, 8), torch.arange(2)
IMAGES = [torch.randn(4, 5, 8), torch.randn(3, 6, 8)]
VOLUMES = torch.randn(2, 1, 4, 5, 6)
_X, _Y = "(2, 5, 8) of torch.float32", "(2, 8) of torch.float32"
_IMAGES = "[(4, 5, 8) of torch.float32, (3, 6, 8) of torch.float32]"
TAKEN: dict[str, tuple[type[nn.Module], Any, list[str]]] = {
    "a sequence": (Tokens, X, [_X]),
    "float16": (Tokens, X.half(), [_X]),
    "volumes": (Volumes, VOLUMES, ["(2, 1, 4, 5, 6) of torch.float32"]),
    "keywords": (Tokens, {"x": X, "mask": X > 0}, [f"x={_X}, mask=(2, 5, 8) of torch.bool"]),
    "a dictionary": (Pyramid, {"p3": X, "p4": Y}, [f"{{'p3': {_X}, 'p4': {_Y}}}"]),
    "images": (Detector, IMAGES, [_IMAGES]),
    "two arguments": (Pair, (Y, Y), [f"{_Y}, {_Y}"]),
    "batches": (Tokens, [X, Y], [_X, _Y]),
    "a generator": (Tokens, (x for x in (X, Y)), [_X, _Y]),
    "batches of images": (Detector, [IMAGES, IMAGES], [_IMAGES] * 2),
    "batches of keywords": (Tokens, [{"x": X}, {"x": Y}], [f"x={_X}", f"x={_Y}"]),
    "batches of arguments": (Pair, [(Y, Y), [Y, Y]], [f"{_Y}, {_Y}"] * 2),
    "an optional argument": (Tokens, [(X, X > 0)], [f"{_X}, (2, 5, 8) of torch.bool"]),
    "labels": (Volumes, [(VOLUMES, Y)], ["(2, 1, 4, 5, 6) of torch.float32"]),
    "labels beside an option": (Tokens, [(X, LABELS), [X, LABELS]], [_X, _X]),
    "texts beside an option": (Any_, [(X, ["cat", "dog"])], [_X]),
    "labels of two arguments": (Pair, [(Y, Y, LABELS)], [f"{_Y}, {_Y}"]),
    "targets": (Detector, [(IMAGES, [{"labels": LABELS}] * 2)], [_IMAGES]),
    "a data loader": (Tokens, DataLoader(TensorDataset(X, LABELS), 2), [_X]),
    "a data loader without labels": (Tokens, DataLoader(TensorDataset(X), 2), [_X]),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_a_call_takes(kind: str) -> None:
    model, calibrate, expected = TAKEN[kind]
    assert [*map(str, _calibrated(model(), calibrate))] == expected


def test_a_model_of_transformers() -> None:
    model, x = vit_of_transformers(), torch.randn(2, 3, 32, 32)
    for calibrate in ({"pixel_values": x}, [{"pixel_values": x, "return_dict": False}], [(x,)], x):
        assert len(_calibrated(model, calibrate)) == 1


def test_ranges_are_of_the_calls() -> None:
    """Not of those that the model turned out to refuse."""

    class Picky(Tokens):
        def forward(self, x: Any, mask: Any = None) -> Any:
            self.fc(100 * x[0])
            return self.fc(torch.stack(x))

    model = Picky()
    layers = [("fc", model.fc)]
    ranges, (call,) = quantization._calibrate(model, layers, [X, X])
    assert str(call) == f"[{_X}, {_X}]"
    assert ranges == quantization._ranges(model, layers, [Call(([X],), {})])


@pytest.mark.parametrize(
    ("model", "calibrate", "said"),
    [
        (Tokens, [], "at least one batch, got none"),
        (Tokens, {}, "batch 0 has no values that Tokens could take, got {}"),
        (Tokens, [X, "cat"], "batch 1 has no values that Tokens could take, got 'cat'"),
        (Tokens, [(), X], r"batch 0 has no values that Tokens could take, got $"),
        (Tokens, [X, torch.zeros(2, 7)], r"Tokens does not accept \(2, 7\) of torch.float32, with"),
        (Tokens, {"y": X}, r"Tokens does not accept {'y': \(2, 5, 8\) of torch.float32}, with wh"),
        (Tokens, [(Y, X > 0)], r"not accept \(2, 8\) of torch.float32, \(2, 5, 8\) of torch.b"),
        (Pair, [Y], r"Pair does not accept \(2, 8\) of torch.float32, .* missing 1 required"),
        (Pair, [(Y, X)], r"does not accept \(2, 8\) of torch.float32, \(2, 5, 8\) of torch.float3"),
        (Detector, [X[0]], r"Detector does not accept \(5, 8\) of torch.float32"),
        (Tokens, [X, X.nan_to_num().mul(torch.inf)], "batch 1 has NaN or values infinite in"),
        (Tokens, X.to_sparse(), r"batch 0 has a tensor without plain values \(torch.sparse_coo on"),
        (Tokens, torch.zeros(2, 8), "gives no layer inputs that are finite and not all zeros"),
    ],
)
def test_what_no_call_takes(model: type[nn.Module], calibrate: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _calibrated(model(), calibrate)


def test_masks_may_be_infinite() -> None:
    mask = torch.full((5, 5), -torch.inf).triu(1)
    assert torch.equal(Call((X, mask), {}).checked(Tokens(), "a batch").args[1], mask)


def test_calls_are_shown_shortly() -> None:
    (calls, *_) = readings([{"x": [Y] * 100, "mask": "a" * 1000}], Tokens())
    assert len(str(calls[0])) < 500 and str(calls[0]).startswith("x=[(2, 8) of torch.float32, (2")
