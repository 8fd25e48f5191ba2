"""Fused models behave like plain ones: bad images, changed weights, tracing."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm_models import network
from torch import Tensor, nn
from zoo import FAMILIES, RESTORATION, Mould, images, randomise, small

import backbones

CALLS = 5  # recorded twice, captured, and replayed
X = images(2, 3, 48, 40)
NETWORKS = [*FAMILIES, "resnet"]  # of this library, and of timm
HOOKS = {
    "forward": ("forward_pre_hook", "forward_hook"),
    "pre": ("forward_pre_hook",),
    "backward": ("full_backward_hook",),
}
# Autograd refuses them where the next operator works in place, as timm's resnet adds its shortcuts.
BACKWARD_HOOKS = [pytest.param("backward", f, marks=pytest.mark.slow) for f in FAMILIES]


def pictures(family: str) -> Tensor:
    """Images with several windows, and a ragged border."""
    return images(2, 3, 24, 20) if family in RESTORATION else X


@functools.cache
def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """A plain model and itself fused, which has replayed :func:`pictures`."""
    plain = network("resnet")[0] if family == "resnet" else randomise(small(family)).eval()
    fused = backbones.fuse(copy.deepcopy(plain))
    x = pictures(family)
    with torch.no_grad():
        for _ in range(CALLS):
            fused(x)
    return plain, fused


@functools.cache
def mould(family: str) -> Mould:
    """To copy the fused model of :func:`pair` from."""
    return Mould(pair(family)[1])


def _spoilt(x: Tensor, value: float, *, whole: bool = False) -> Tensor:
    x = x.clone()
    x[0, 0, 5, 5] = value
    if whole:
        x[0] = value
    return x


HOSTILE: dict[str, Callable[[Tensor], Any]] = {
    **{f"{n} channels": lambda x, n=n: torch.cat([x, x], 1)[:, :n] for n in (0, 1, 4)},
    **{str(d): lambda x, d=d: x.to(d) for d in (torch.float64, torch.float16, torch.int64)},
    "bool": lambda x: x.bool(),
    "three axes": lambda x: x[0],
    "no rows": lambda x: x[:, :, :0],
    "no images": lambda x: x[:0],
    "sparse": lambda x: x.to_sparse(),
    "negated view": lambda x: torch._neg_view(x),
    "expanded": lambda x: x[:, :1, :1, :1].expand_as(x),
    "an image that wants gradients": lambda x: x.clone().requires_grad_(),
    "a pixel of NaN": lambda x: _spoilt(x, float("nan")),
    "an infinite pixel": lambda x: _spoilt(x, float("inf")),
    "an image of NaN": lambda x: _spoilt(x, float("nan"), whole=True),
}


def _answer(model: nn.Module, x: Any) -> Tensor | Exception:
    with torch.set_grad_enabled(isinstance(x, Tensor) and x.requires_grad):
        try:
            out: Tensor = model(x)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            return error
    return out.detach()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_images(kind: str, family: str) -> None:
    plain, fused = pair(family)
    x = HOSTILE[kind](pictures(family))
    expected = _answer(plain, x)
    for _ in range(CALLS):
        out = _answer(fused, x)
        if isinstance(expected, Exception):
            assert isinstance(out, Exception), f"plain refuses: {expected}"
        else:
            assert isinstance(out, Tensor), f"fused refuses: {out}"
            scale = float(expected.nan_to_num().abs().max()) if expected.numel() else 1.0
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_on_the_meta_device(family: str) -> None:
    """They have no numbers: no memory that was left over may come out as a result."""
    _, fused = pair(family)
    for _ in range(CALLS):
        out = _answer(fused, pictures(family).to("meta"))
        assert isinstance(out, Exception) or out.is_meta


def _scaled(t: Tensor) -> Tensor:
    return t.detach() * 1.02


def _loaded(model: nn.Module, assign: bool = False) -> None:
    state = model.state_dict()
    scaled = {k: _scaled(v) if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(scaled, assign=assign)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "copied": lambda model: [p.copy_(_scaled(p)) for p in model.parameters()],
    "data": lambda model: [setattr(p, "data", _scaled(p)) for p in model.parameters()],
    "buffers": lambda model: [b.copy_(_scaled(b)) for b in model.buffers() if b.ndim],
    "new parameters": lambda model: _loaded(model, assign=True),
    "loaded": _loaded,
}


# Each layer of a family says what it was derived from; how that is compared is the same for all.
@pytest.mark.parametrize(
    ("change", "family"),
    [
        *itertools.product(["copied"], NETWORKS),
        *itertools.product(("data", "new parameters", "loaded"), ("hat", "resnet", "vmamba")),
        ("buffers", "resnet"),
    ],
)
def test_changed_weights_are_noticed(change: str, family: str) -> None:
    fused, x = mould(family).copy(), pictures(family)
    with torch.no_grad():
        before = [fused(x) for _ in range(CALLS)][-1]
        CHANGES[change](fused)
        expected = Mould(fused).copy()(x)  # nothing that was derived is copied
        assert not torch.allclose(before, expected, rtol=1e-4)
        for _ in range(CALLS):
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["hat", "resnet", "vmamba"])
def test_fusing_again_picks_up_untracked_writes(family: str) -> None:
    fused: Any = mould(family).copy()
    x = pictures(family)
    with torch.no_grad():
        for _ in range(CALLS):
            fused(x)
        for p in fused.parameters():
            p.detach().numpy()[...] *= 1.1
        expected = Mould(fused).copy()(x)
        backbones.fuse(fused)
        for _ in range(CALLS):
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """A submodule for each place that a kind of module has inside another kind."""
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        found.setdefault((type(modules[parent]), type(module), last), (name, module))
    return dict(found.values())


def _calls(model: nn.Module, module: nn.Module, x: Tensor) -> bool:
    seen: list[int] = []
    with module.register_forward_hook(lambda *_: seen.append(1)):
        model(x)
    return bool(seen)


# Of modules that get no tensor with a gradient, such as one that counts positions.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(
    ("kind", "family"),
    [("pre", "efficientvit"), *(("forward", f) for f in NETWORKS), *BACKWARD_HOOKS],
)
def test_hooks_are_called(kind: str, family: str) -> None:
    """Wherever they are, after calls were replayed; without them, all is as before."""
    fused: Any = mould(family).copy()
    folded: Any = backbones.fuse(mould(family).copy(), channels_last=False)
    x = images(1, 3, 24, 20) if family in RESTORATION else images(1, 3, 32, 32)
    x.requires_grad_(kind == "backward")
    for module in fused.modules():
        if kind == "backward" and hasattr(module, "inplace"):
            module.inplace = False
    with torch.set_grad_enabled(x.requires_grad):
        for _ in range(CALLS):
            before = fused(x)
        for name, module in _places(fused).items():
            seen: list[int] = []
            hooks = [getattr(module, f"register_{hook}") for hook in HOOKS[kind]]
            handles = [add(lambda *_, i=i, s=seen: s.append(i)) for i, add in enumerate(hooks)]
            out = fused(x)
            if kind == "backward":
                out.sum().backward()
            assert seen == [*range(len(hooks))] * (len(seen) // len(hooks)), name
            if not seen:  # the folded model ignores it, too: torch calls no hooks of containers
                assert not _calls(folded, folded.get_submodule(name), x), name
            torch.testing.assert_close(out, before, rtol=1e-3, atol=1e-3)
            for handle in handles:
                handle.remove()
        torch.testing.assert_close(fused(x), before, rtol=1e-3, atol=1e-3)


def test_hooks_of_folded_layers(caplog: pytest.LogCaptureFixture) -> None:
    model = small("shvit").eval()
    model.stages[0].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING):
        model.fuse()
    assert not caplog.records
    model = small("shvit").eval()
    model.stem[0].norm.register_forward_hook(lambda *_: None)
    model.stem[1].norm.register_full_backward_pre_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING):
        model.fuse()
    (record,) = caplog.records
    assert "the hooks of ['stem.0.norm', 'stem.1.norm'] were removed" in record.getMessage()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("family", ["shvit", "van", "inception_next"])
def test_tracing_takes_the_plain_layers(family: str) -> None:
    _, fused = pair(family)
    with torch.no_grad():
        traced = torch.jit.trace(fused, X, check_trace=False)
        torch.testing.assert_close(traced(X), fused(X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "arguments", [{"dtype": "bf16"}, {"dtype": torch.complex64}, {"channels_last": 1}]
)
def test_bad_arguments_of_fuse(arguments: dict[str, Any]) -> None:
    (value,) = arguments.values()
    for model in (small("shvit"), nn.Linear(2, 2)):
        with pytest.raises((TypeError, ValueError), match=f"got {value!r}"):
            backbones.fuse(model, **arguments)
