"""The three scans in torch: operators, compilation, autocast, ONNX, without kernels, Triton."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from compiled_kernels import forget_kernels
from fresh_python import run_code
from scan_inputs import difference, inputs, map_inputs, selective_inputs
from torch import Tensor, nn
from torch.export import Dim
from triton_runs import run_cases

from ops import bi_wkv, linear_attention, selective_scan
from ops.cpu import build

FOLDER = Path(__file__).parent


def _wkv(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    key, value = torch.randn(2, 2, tokens, 11, generator=generator, dtype=torch.float64)
    decay = torch.linspace(-5, 3, 11, dtype=torch.float64) / tokens
    return {"key": key, "value": value, "decay": decay, "first": decay.flip(0)}


class Scan(NamedTuple):
    """A function, tensors for it, and the kernel and the backends behind it."""

    function: Callable[..., Tensor]
    inputs: Callable[[int], dict[str, Any]]  # of a number of tokens
    options: dict[str, Any]
    library: str
    package: Any


SCANS = {
    "bi_wkv": Scan(bi_wkv.bi_wkv, _wkv, {}, "wkv", bi_wkv),
    "bi_wkv in segments": Scan(bi_wkv.bi_wkv, _wkv, {"segments": 4}, "wkv", bi_wkv),
    "gated_linear_attention": Scan(
        linear_attention.gated_linear_attention,
        lambda tokens: inputs(tokens, bonus=True),
        *({}, "gated_scan", linear_attention),
    ),
    "selective_scan": Scan(
        selective_scan.selective_scan,
        lambda tokens: selective_inputs(tokens, states=2),
        *({"delta_softplus": True}, "selective_scan", selective_scan),
    ),
    "cross_selective_scan": Scan(
        selective_scan.cross_selective_scan,
        lambda tokens: map_inputs(3, tokens // 3),
        *({"delta_softplus": True}, "selective_scan", selective_scan),
    ),
}
EVERY = pytest.mark.parametrize("name", SCANS)


def _single(name: str, tokens: int = 33) -> dict[str, Tensor]:
    found = SCANS[name].inputs(tokens)
    return {n: t.float() for n, t in found.items() if t is not None}


# Those with loops over chunks take longest.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "cpu") for name in SCANS),
        *((name, "chunked") for name in ("gated_linear_attention", "selective_scan")),
        *(
            pytest.param(name, "chunked", marks=pytest.mark.slow)
            for name in ("bi_wkv", "bi_wkv in segments", "cross_selective_scan")
        ),
    ],
)
def test_compiles_into_one_graph(name: str, backend: str) -> None:
    scan = SCANS[name]
    tensors = {n: t.requires_grad_() for n, t in _single(name, 9).items()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return scan.function(**tensors, **scan.options, backend=backend).square().sum()

    torch._dynamo.reset()
    leaves = list(tensors.values())
    expected = torch.autograd.grad(loss(tensors), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, of in zip(torch.autograd.grad(compiled(tensors), leaves), expected, strict=True):
        torch.testing.assert_close(got, of, rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_autocast_leaves_sums_alone(name: str, backend: str) -> None:
    """Also of maps in bfloat16 beside parameters in float32."""
    scan, tensors = SCANS[name], _single(name)
    for maps in ("query", "key", "value", "u", "delta", "B", "C", "x", "projected"):
        if maps in tensors:
            tensors[maps] = tensors[maps].bfloat16()
    expected = scan.function(**tensors, **scan.options, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = scan.function(**tensors, **scan.options, backend=backend)
    assert torch.equal(out, expected) and out.dtype == torch.bfloat16


@EVERY
def test_without_a_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend computes it, and the one that was asked for says why it cannot."""
    scan, tensors = SCANS[name], _single(name)
    expected = scan.function(**scan.inputs(33), **scan.options, backend="reference")
    forget_kernels(monkeypatch)
    missing = build.LibraryState(None, None, "portable", "no C++ compiler found")
    monkeypatch.setitem(build.process.states, scan.library, missing)
    assert difference(scan.function(**tensors, **scan.options), expected) < 1e-5
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot.*no C\+\+ compiler found"):
        scan.function(**tensors, **scan.options, backend="cpu")


@EVERY
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scan, tensors = SCANS[name], _single(name)
    with pytest.raises(NotImplementedError, match="'triton' cannot.*CUDA device, got cpu"):
        scan.function(**tensors, **scan.options, backend="triton")
    wide = {n: t.double() for n, t in tensors.items()}
    with pytest.raises(NotImplementedError, match="float64"):
        scan.function(**wide, **scan.options, backend="triton")


def test_states_that_triton_does_not_hold() -> None:
    wide = torch.zeros(1, 1, 1, 257)
    assert "got 257" in linear_attention.triton.unavailable(wide, wide, wide)
    u, rate = torch.zeros(1, 8, 4), torch.zeros(8, 300)
    assert "256 states per channel, got 300" in selective_scan.triton.unavailable(u, rate)


@pytest.mark.parametrize("optional", [pytest.param(False, marks=pytest.mark.slow), True])
def test_operators(optional: bool) -> None:
    operators = torch.ops.vision_backbones
    cases: dict[str, tuple[list[Any], tuple[Any, ...]]] = {
        "sequence_scan": (list(_single("selective_scan", 9).values()), (True,)),
        "map_scan": (list(_single("cross_selective_scan", 12).values()), (True,)),
    }
    cases["map_scan"][0][2] = cases["map_scan"][0][2].mT
    for name, (tensors, options) in cases.items():
        if not optional:
            tensors[-2:] = None, None
        grad = torch.randn_like(tensors[0])
        torch.library.opcheck(getattr(operators, f"{name}_backward"), (grad, *tensors, *options))
        wanted = [t if t is None else t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(getattr(operators, name), (*wanted, *options))
    given = inputs(9, back=optional, bonus=optional, dtype=torch.float32)
    tensors = [t if t is None else t.requires_grad_() for t in given.values()]
    torch.library.opcheck(operators.gated_scan, (*tensors, 0.5))
    detached = [t if t is None else t.detach() for t in tensors[:5]]
    grad = torch.randn_like(detached[2])
    torch.library.opcheck(operators.gated_scan_backward, (grad, *detached, optional, 0.5))


class Layer(nn.Module):
    """A scan of its tensors in their order."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.scan, self.names = SCANS[name], list(_single(name, 3))

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        return self.scan.function(**named, **self.scan.options)


# The axes of tokens; those of a map of any size take half a minute.
ANY_SIZE = {
    "bi_wkv": None,
    "bi_wkv in segments": {"key": {1: Dim.DYNAMIC}, "value": {1: Dim.DYNAMIC}},
    "gated_linear_attention": dict.fromkeys(
        ("query", "key", "value", "log_gate", "log_gate_back"), {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    ),
    "selective_scan": None,
    "cross_selective_scan": None,
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(
    ("name", "exported"),
    [("gated_linear_attention", 12)]
    + [pytest.param(name, 42, marks=pytest.mark.slow) for name in SCANS],
)
@torch.no_grad()
def test_onnx(name: str, exported: int) -> None:
    """Of one chunk, and of several."""
    tensors, axes = _single(name, exported), ANY_SIZE[name]
    shapes = None if axes is None else (tuple(axes.get(n) for n in tensors),)
    program = torch.onnx.export(
        Layer(name).eval(),
        tuple(tensors.values()),
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for tokens in (42,) if axes is None else (7, 100):
        tensors = _single(name, tokens)
        fed = zip(session.get_inputs(), tensors.values(), strict=True)
        (out,) = session.run(None, {i.name: t.numpy() for i, t in fed})
        assert difference(torch.from_numpy(out), Layer(name)(*tensors.values()).double()) < 1e-5


# -- Triton, interpreted or on a GPU, and compiled for GPUs ----------------------------------------
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.{package}.triton import kernels

for kernel in ({kernels}):
    for flag in (False, True):
        constants = dict({constants}, FOR_BACKWARD=flag, SEGMENTS=flag)
        constants = {{n: v for n, v in constants.items() if n in kernel.arg_names}}
        signature = {{}}
        for name in kernel.arg_names:
            if name.endswith("strides"):
                signature[name] = ("i32",) * 4
            elif name in constants:
                signature[name] = "constexpr"
            else:
                pointer = name.endswith("ptr") or name.endswith("_pointer")
                signature[name] = "*fp32" if pointer else "i32"
        if "scale" in signature:
            signature["scale"] = "fp32"
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32))
        assert compiled.asm["ptx"]
"""
COMPILED = {
    "linear_attention": "DIM=32, VALUE_DIM=64, PADDED_DIM=32, BLOCK=64, CHUNK=16, APART=False",
    "selective_scan": "STATES=16, PADDED=16, BLOCK=64, CHUNK=16, SOFTPLUS=True",
}
QUICK = {
    "bi_wkv": ("-m", "not slow"),
    "linear_attention": ("-k", "gradients and False-False"),
    "selective_scan": ("-k", "gradients and 6-1-2"),
}


@pytest.mark.parametrize("package", QUICK)
def test_triton_kernels(package: str, tmp_path: Path) -> None:
    run_cases(FOLDER / package / "triton_cases.py", tmp_path, *QUICK[package])


@pytest.mark.slow
@pytest.mark.parametrize("package", QUICK)
def test_triton_kernels_in_all_cases(package: str, tmp_path: Path) -> None:
    every = ("-m", "slow or not slow")
    run_cases(FOLDER / package / "triton_cases.py", tmp_path, *every)


@pytest.mark.slow
@pytest.mark.parametrize("package", COMPILED)
def test_triton_kernels_compile_ahead_of_time(package: str, tmp_path: Path) -> None:
    kernels = "kernels.forward_kernel, kernels.backward_kernel"
    constants = COMPILED[package]
    run_code(_COMPILE.format(package=package, kernels=kernels, constants=constants), tmp_path)
