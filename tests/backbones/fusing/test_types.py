"""The types that fused models take and return: ``fuse(dtype=…, outputs=…)``."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from compiled_kernels import without_kernels
from timm_models import network, vit_of_transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from zoo import images, randomise, small

import backbones
from backbones.fusing import types
from backbones.fusing.types import OUTPUTS, call_with_types, set_types, tensors
from ops.cpu import bfloat16

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALF = torch.bfloat16
SIZE = (2, 3, 64, 64)

Point = namedtuple("Point", ("x", "name"))


@dataclasses.dataclass
class Found:
    boxes: Tensor
    size: tuple[int, int]
    more: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    boxes: Tensor


def _found(x: Tensor) -> Found:
    found = Found(x, (2, 3))
    found.more["boxes"] = x
    return found


# Structures with a tensor, and what gives it back.
STRUCTURES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a list": (lambda x: [x, None], lambda s: s[0]),
    "a tuple": (lambda x: (1, "a", x), lambda s: s[2]),
    "a named tuple": (lambda x: Point(x, "a"), lambda s: s.x),
    "one of torch": (lambda x: torch.return_types.max((x, x.long())), lambda s: s.values),
    "a dictionary": (lambda x: {"x": x, 1: 2}, lambda s: s["x"]),
    "an ordered one": (lambda x: OrderedDict(x=x), lambda s: s["x"]),
    "one with defaults": (lambda x: defaultdict(list, x=x), lambda s: s["x"]),
    "a deque": (lambda x: deque([x], 3), lambda s: s[0]),
    "a dataclass": (_found, lambda s: s.more["boxes"]),
    "a frozen one": (Frozen, lambda s: s.boxes),
    "transformers' output": (lambda x: BaseModelOutput(x, (x, x)), lambda s: s.hidden_states[1]),
    "transformers' batch": (lambda x: transformers.BatchFeature({"x": x}), lambda s: s["x"]),
    "nested": (lambda x: {"a": [Point((x,), "")]}, lambda s: s["a"][0].x[0]),
}


class Echo(nn.Module):
    """Calls a function with the cast arguments, as fused networks do."""

    def __init__(self, function: Callable[..., Any], outputs: Any = "input") -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2).to(HALF)
        self.function = function
        set_types(self, outputs)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return call_with_types(Echo._plain, self, args, kwargs)


X = torch.randn(2, 2)


def _floats(value: Any) -> set[torch.dtype]:
    return {t.dtype for t in tensors(value) if t.is_floating_point()}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structures_are_cast_and_cast_back(kind: str) -> None:
    make, part = STRUCTURES[kind]
    given = make(X)

    def returned(first: Any, key: Any = None) -> Any:
        taken = first if key is None else key
        assert type(taken) is type(given) and _floats(taken) == {HALF}
        return taken

    model = Echo(returned)
    for out in (model(given), model(None, key=given)):
        assert type(out) is type(given) and _floats(out) == {torch.float32}
        assert torch.equal(part(out), X.to(HALF).float())
    assert part(given) is X  # which is left as it was
    right = make(X.to(HALF))
    assert model(right) is right  # nothing to cast


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_the_type_of_results(outputs: str, dtype: torch.dtype) -> None:
    model = Echo(lambda x, **_: {"x": x, "n": x.long(), "c": x.to(torch.complex64)}, outputs)
    wanted = {"input": dtype, "float32": torch.float32, "native": HALF}[outputs]
    for out in (model(X.to(dtype)), model(X.to(dtype), later=X.double())):
        assert [t.dtype for t in out.values()] == [wanted, torch.int64, torch.complex64]
    flags = torch.tensor([True])
    assert model(flags)["x"] is flags  # no floating-point tensor to be like


def test_one_tensor_in_several_places_stays_one() -> None:
    first, second = Echo(lambda x, y: (x, {"x": x, "y": y[0]}))(X, [X])
    assert second["x"] is first is second["y"]
    endless: list[Any] = [X]
    endless.append(endless)
    assert Echo(lambda x: x[0])(endless).dtype == torch.float32


def test_calls_in_the_right_type_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "converted", None)  # which looks at every part of a structure
    model = Echo(lambda x, y=None: x)
    for x in (X.to(HALF), X.to(HALF).requires_grad_()):
        assert model(x) is model(x, y=x) is model(x, None) is x


def test_methods_that_call_each_other_cast_once() -> None:
    model: Any = Echo(lambda x: model(x[0]).dtype if x.ndim == 2 else x, "float32")
    assert model(X) == HALF
    model.function = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(X)
    model.function = lambda x: x
    assert model(X).dtype == torch.float32
    other = Echo(lambda x: x, "float32")
    model.function = lambda x: other(x).dtype
    assert model(X) == torch.float32  # of a network inside


def test_threads_do_not_share_a_call() -> None:
    inside, results = threading.Event(), []
    model = Echo(lambda x, wait: inside.wait(9) if wait else x)
    thread = threading.Thread(target=lambda: results.append(model(X, True)))
    thread.start()
    assert model(X, False).dtype == torch.float32
    inside.set()
    thread.join()
    assert results == [True]


def test_the_dtype_is_that_of_the_parameters() -> None:
    model: Any = Echo(lambda x: x.dtype)
    assert model.double()(X) == torch.float64
    model.fc = nn.Linear(2, 2).half()
    assert model(X) == torch.float16
    del model.fc
    model.other = nn.Linear(2, 2).to(HALF)
    assert model(X) == HALF


def test_gradients_and_inference_tensors() -> None:
    x = X.clone().requires_grad_()
    Echo(lambda x: 3 * x)(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(X, 3))
    with torch.inference_mode():
        assert Echo(lambda x: x)(X).is_inference()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_torch_compile_sees_the_casts() -> None:
    model = Echo(lambda x: {"x": x["x"] + 1})
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled({"x": X})["x"]
    assert out.dtype == torch.float32 and torch.equal(out, model({"x": X})["x"])


# ---- fused models ------------------------------------------------------------------------------
def _model(kind: str) -> tuple[Any, Tensor]:
    if kind == "shvit":
        return randomise(small("shvit")).eval(), images(*SIZE)
    return network("resnet", 2)


def _error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("kind", ["shvit", "resnet"])
@torch.no_grad()
def test_every_type_comes_back(kind: str, dtype: torch.dtype) -> None:
    model, x = _model(kind)
    expected = model.double()(x.double())
    fused = backbones.fuse(model.float(), dtype)
    computed = next(fused.parameters()).dtype
    bound = 0.1 if dtype == torch.int8 or computed.itemsize == 2 else 1e-4
    for given in FLOATS:
        rounding = 0 if given in (torch.float32, torch.float64) else 0.02
        for _ in range(4):
            out = fused(x.to(given))
            assert out.dtype == given and _error(out, expected) < bound + rounding
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), backbones.fuse(fused)):
        assert other(x).dtype == torch.float32 and other(x.half()).dtype == torch.float16
    folded = backbones.fuse(_model(kind)[0], computed, channels_last=False)
    out = folded(x.double())
    assert out.dtype == torch.float64 and _error(out, expected) < bound
    assert pickle.loads(pickle.dumps(folded))(x.half()).dtype == torch.float16


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("kind", ["shvit", "resnet"])
@torch.no_grad()
def test_outputs(kind: str, outputs: Any) -> None:
    model, x = _model(kind)
    fused: Any = backbones.fuse(model, HALF, outputs=outputs)
    for given in (torch.float16, HALF):
        wanted = {"input": given, "float32": torch.float32, "native": HALF}[outputs]
        for _ in range(4):
            assert fused(x.to(given)).dtype == wanted
            last, maps = fused.forward_intermediates(x.to(given))
            assert {t.dtype for t in (last, *maps)} == {wanted}
    with torch.no_grad():
        backbones.fuse(fused, HALF)
        assert fused(x).dtype == torch.float32


@torch.no_grad()
def test_keywords_and_outputs_of_transformers() -> None:
    model, x = vit_of_transformers().eval(), torch.randn(2, 3, 32, 32)
    expected = model(x).last_hidden_state
    fused: Any = backbones.fuse(model, HALF)
    for _ in range(4):
        out = fused(pixel_values=x, output_hidden_states=True)
        assert type(out).__name__ == "BaseModelOutputWithPooling"
        assert {t.dtype for t in tensors(out)} == {torch.float32} and len(out.hidden_states) == 3
        assert _error(out.last_hidden_state, expected) < 0.05


class Detector(nn.Module):
    """Of lists of images of several sizes, as torchvision's are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network("resnet")[0]

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        scores = [self.body(image[None])[0] for image in images]
        return [{"scores": s, "label": s.argmax()} for s in scores]


@pytest.mark.parametrize("dtype", [HALF, torch.int8])
@torch.no_grad()
def test_lists_of_images(dtype: torch.dtype) -> None:
    model, given = Detector().eval(), [torch.randn(3, 64, 64), torch.randn(3, 48, 96)]
    expected = model(given)
    options: Any = {"calibrate": given, "max_drop": 1.0} if dtype == torch.int8 else {}
    fused = backbones.fuse(model, dtype, **options)
    for _ in range(4):
        for found, wanted in zip(fused(given), expected, strict=True):
            assert found["scores"].dtype == torch.float32 and found["label"].dtype == torch.int64
            assert _error(found["scores"], wanted["scores"]) < 0.1


def test_images_that_no_cast_helps() -> None:
    fused = randomise(small("shvit")).eval().fuse(HALF)
    for x in (images(*SIZE).to(torch.uint8), images(*SIZE)[:, :1], images(*SIZE)[0]):
        with pytest.raises(ValueError, match=r"expects images \(B, 3, H, W\) of a floating-point"):
            fused(x)
    with pytest.raises(TypeError, match="got a list"):
        fused([images(*SIZE)])


@torch.no_grad()
def test_without_a_dtype_types_are_those_of_the_network() -> None:
    for model, x in (_model("shvit"), _model("resnet")):
        fused = backbones.fuse(model.to(HALF))
        assert fused(x.to(HALF)).dtype == HALF
        with pytest.raises((ValueError, RuntimeError), match=r"BFloat16|torch.bfloat16"):
            fused(x)


@torch.no_grad()
def test_images_of_integers_keep_the_type_of_the_network() -> None:
    """Where a network centres them."""
    fused = randomise(small("hat")).eval().fuse(HALF)
    x = (255 * images(1, 3, 24, 24).abs().clamp(max=1)).to(torch.uint8)
    assert fused(x).dtype == HALF and fused(x.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["shvit", "a layer"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": HALF, "outputs": "float16"}, "one of input, float32, native, got 'float16'"),
        ({"dtype": HALF, "outputs": torch.float32}, "outputs must be one of .*, got torch.float32"),
        ({"dtype": HALF, "outputs": ["input"]}, r"outputs must be one of .*, got \['input'\]"),
        ({"outputs": "native"}, "outputs='native' is for a given dtype, but dtype is None"),
    ],
)
def test_bad_outputs(options: Any, said: str, kind: str) -> None:
    model = small("shvit").eval() if kind == "shvit" else nn.Linear(2, 2)
    with pytest.raises(ValueError, match=said):
        backbones.fuse(model, **options)
    assert next(model.parameters()).dtype == torch.float32


# ---- dtype="auto" ------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@torch.no_grad()
def test_auto(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "faster_dtype", lambda: dtype)
    for model, x in (_model("shvit"), _model("resnet")):
        fused = backbones.fuse(model.to(HALF), "auto")
        assert {p.dtype for p in fused.parameters()} == {dtype} and fused(x).dtype == x.dtype
    assert next(backbones.fuse(nn.Linear(2, 2), "auto").parameters()).dtype == dtype


def test_auto_is_for_cpus() -> None:
    with pytest.raises(ValueError, match="dtype='auto' is for models on the CPU, not on meta"):
        backbones.fuse(nn.Linear(2, 2, device="meta"), "auto")
    assert backbones.fuse(nn.ReLU(), "auto")(X).dtype == X.dtype
    with pytest.raises(ValueError, match="calibrate is for dtype=torch.int8, but dtype is auto"):
        backbones.fuse(nn.Linear(2, 2), "auto", calibrate=X)


def test_int8_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are those of other models."""
    without_kernels(monkeypatch)
    model, x = _model("resnet")
    with torch.no_grad():
        assert backbones.fuse(model, torch.int8)(x.half()).dtype == torch.float16
