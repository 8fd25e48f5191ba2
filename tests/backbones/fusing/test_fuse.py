"""``fuse()``: equal outputs, equal names, and the plain form where required."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from compiled_kernels import compiled_for, without_kernels
from timm_models import network
from torch import Tensor, nn
from zoo import FAMILIES, RESTORATION, Mould, images, randomise, small

import backbones
from backbones.cli.parity import relative_error
from backbones.fusing.fuse import FusedBackbone
from ops.cpu.gemm.linear import packed_linear
from ops.fuse.calls import Calls
from ops.inference import layers

every_family = pytest.mark.parametrize("family", FAMILIES)
every_network = pytest.mark.parametrize("family", [*FAMILIES, "resnet"])  # one of timm


def _made(family: str) -> Any:
    return network(family)[0] if family == "resnet" else randomise(small(family)).eval()


def _sizes(family: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two, of which one is ragged; restoration models have maps of the size of the image."""
    if family in RESTORATION:
        return (1, 3, 22, 29), (3, 3, 24, 16)
    return (1, 3, 70, 45), (3, 3, 40, 64)


def _side(family: str) -> int:
    return 24 if family in RESTORATION else 40


def _fast_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, layers.FastLayer)]


@every_family
@torch.no_grad()
def test_all_dtypes_and_paths(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model all the way, since a random one is slow to make."""
    model = _made(family)
    folded = Mould(model).copy().fuse(channels_last=False)
    assert not _fast_layers(folded)
    fused = Mould(folded).copy().fuse()
    assert isinstance(fused, FusedBackbone)
    assert not any(p.requires_grad for p in fused.parameters())
    names = [name for name, _ in fused.named_modules()]
    assert fused.fuse() is fused and [name for name, _ in fused.named_modules()] == names
    assert fused.state_dict().keys() == folded.state_dict().keys()

    sizes = _sizes(family)
    expected = [model(images(*size)) for size in sizes]
    for size, value in zip(sizes, expected, strict=True):
        assert relative_error(fused(images(*size)), value) <= 1e-5
        # Whatever the memory format of the image.
        last = images(*size).contiguous(memory_format=torch.channels_last)
        assert relative_error(fused(last), value) <= 1e-5

    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        out = copied(images(*sizes[0]))  # plain, while the other's is replayed
        assert relative_error(out, fused(images(*sizes[0]))) <= 1e-5

    half = Mould(fused).copy().fuse(dtype=torch.bfloat16)
    out = half(images(*sizes[0]).bfloat16())
    assert out.dtype == torch.bfloat16
    plain = Mould(folded).copy().bfloat16()(images(*sizes[0]).bfloat16()).float()
    # As far from the truth as the plain form in that precision, which chooses other regions or
    # rounds at other places.
    error = relative_error(plain, expected[0])
    assert relative_error(out.float(), expected[0]) <= 2 * error + 1e-2

    double = Mould(fused).copy().double()
    assert relative_error(double(images(*sizes[0]).double()).float(), expected[0]) <= 1e-5

    without_kernels(monkeypatch)
    assert relative_error(Mould(fused).copy()(images(*sizes[0])), expected[0]) <= 1e-5


@pytest.mark.parametrize(("family", "size"), [("efficientvit", (64, 160)), ("favit", (96, 8))])
@torch.no_grad()
def test_oblong_images(family: str, size: tuple[int, int]) -> None:
    """Wider than a window but not as high, and narrower than the reduction but higher."""
    model, x = _made(family), images(1, 3, *size)
    expected = model(x)
    assert relative_error(model.fuse()(x), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
@torch.no_grad()
def test_calls_repeat_to_the_last_bit(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # RAVLT's images go through its attention one by one, as large ones do.
    monkeypatch.setattr("ops.inference.attention._PROJECTED_BYTES", 1)
    model = _made(family).fuse(dtype=dtype)
    large = (34, 25) if family in RESTORATION else (130, 97)  # which are cut into windows
    inputs = [
        [images(*size, seed=seed).to(dtype) for seed in range(6)]
        for size in (_sizes(family)[0], (2, 3, *large))
    ]
    repeated = [[model(x) for x in same] for same in inputs]
    doors = [door.name for door in model.doors]
    pyramids = [model.forward_intermediates(inputs[0][0], norm=True) for _ in range(6)]
    # Without kernels of bfloat16 other layers run, which need not be recorded.
    if packed_linear.unavailable(torch.device("cpu"), dtype) is None:
        assert doors == ["recorded", "recorded"]
        assert {door.name for door in model.doors} == {"recorded"}

    # Replays of a kind compute the same.
    for same, outs in zip(inputs, repeated, strict=True):
        for x, out in zip(same[4:], outs[4:], strict=True):
            again = model(x)
            assert torch.equal(out, again) and out.stride() == again.stride()
    for other_last, other_maps in pyramids[5:]:
        last, maps = pyramids[4]
        assert torch.equal(other_last, last)
        assert all(torch.equal(a, b) for a, b in zip(other_maps, maps, strict=True))

    monkeypatch.setattr(
        Calls,
        "__call__",
        lambda self, module, method, args, kwargs: module.run(method, *args, **kwargs),
    )
    bound = 1e-5 if dtype == torch.float32 else 0.1
    for same, outs in zip(inputs, repeated, strict=True):
        for x, out in zip(same, outs, strict=True):
            assert relative_error(out.float(), model(x).float()) <= bound


@functools.cache
@torch.no_grad()
def _fused_output(family: str) -> tuple[Tensor, float]:
    """Of two images in float32, and the error of bfloat16 as this CPU computes it."""
    model, x = _made(family), images(2, *_sizes(family)[0][1:])
    half = copy.deepcopy(model).fuse(dtype=torch.bfloat16)
    expected = model.fuse()(x)
    return expected, relative_error(half(x.bfloat16()), expected)


@pytest.mark.parametrize("has_kernels", [True, False])
@every_family
@torch.no_grad()
def test_bfloat16_without_cpu_support(
    family: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are of float32; all is closer to it than where the CPU multiplies bfloat16."""
    expected, usual = _fused_output(family)
    model, x = _made(family), images(2, *_sizes(family)[0][1:])
    compiled_for("avx2", monkeypatch)
    if not has_kernels:
        without_kernels(monkeypatch)
    half = model.fuse(dtype=torch.bfloat16)
    out = [half(x.bfloat16()) for _ in range(6)]
    assert out[0].dtype == torch.bfloat16 and torch.equal(out[4], out[5])
    assert relative_error(out[0], expected) <= 1.5 * usual + 1e-2
    if has_kernels:
        assert [door.name for door in half.doors] == ["recorded"]
        products = ("linear", "matmul", "mm", "bmm", "baddbmm")
        for call in backbones.explain(half, x.shape[-1], repeats=1).calls:
            is_product = call.kernel in products or "conv" in call.kernel
            assert call.library == "ours" or not is_product or call.dtype != "bfloat16", call


@every_network
def test_gradients_of_the_image(family: str) -> None:
    folded = backbones.fuse(_made(family).double(), channels_last=False)
    fused = backbones.fuse(copy.deepcopy(folded))
    grads = []
    for m in (folded, fused):
        x = images(1, 3, _side(family), _side(family)).double().requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    assert relative_error(grads[1], grads[0]) <= 1e-6


@pytest.mark.parametrize("family", ["inception_next", "unireplknet"])
@torch.no_grad()
def test_torch_export_takes_the_plain_form(family: str) -> None:
    model = _made(family).fuse()
    x = images(1, 3, 64, 64)
    expected = model(x)
    program = torch.export.export(model, (x,))
    assert not [n for n in program.graph.nodes if "mkldnn" in str(n.target)]
    assert relative_error(program.module()(x), expected) <= 1e-5


# Of torch's own compiler, where it is imported first.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.slow
@every_family
@torch.no_grad()
def test_torch_compile_takes_the_plain_form(family: str) -> None:
    model = _made(family).fuse()
    x = images(1, 3, 64, 64)
    torch.compiler.reset()  # which counts how often all fused models' methods were compiled
    compiled = torch.compile(model, fullgraph=family != "medvitv2")
    assert relative_error(compiled(x), model(x)) <= 1e-4


def test_without_onednn_it_only_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "has_onednn", lambda dtype: False)
    model = small("van").eval().fuse()
    assert model.fused and not _fast_layers(model)
    forced = small("van").eval().fuse(channels_last=True)
    weight = forced.stem.conv.weight if hasattr(forced.stem, "conv") else forced.stem.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_meta_models_fold() -> None:
    with torch.device("meta"):
        model = small("shvit").eval()
    assert model.fuse()(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


def test_autocast_keeps_working() -> None:
    model = small("shvit").eval().fuse()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for image in (x, x.bfloat16()):  # whose dtype need not be that of the weights
                assert relative_error(model(image).float(), expected) <= 0.05
