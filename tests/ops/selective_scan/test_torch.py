"""The selective scan in torch: operators, compilation, autocast, ONNX."""

from __future__ import annotations

import io

import onnxruntime
import pytest
import torch
from compiled_kernels import forget_kernels
from scan_inputs import difference, map_inputs, selective_inputs
from torch import Tensor, nn
from torch.export import Dim

from ops.cpu import build
from ops.selective_scan import chunked, cpu, cross_selective_scan, selective_scan


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional):
    operators = torch.ops.vision_backbones
    given = list(selective_inputs(9, states=2, dtype=torch.float32).values())
    of_map = list(map_inputs(3, 4, states=2, dtype=torch.float32).values())
    of_map[2] = of_map[2].mT
    for name, tensors in (("sequence_scan", given), ("map_scan", of_map)):
        if not optional:
            tensors[-2:] = None, None
        grad = torch.randn_like(tensors[0])
        torch.library.opcheck(getattr(operators, f"{name}_backward"), (grad, *tensors, True))
        wanted = [t if t is None else t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(getattr(operators, name), (*wanted, True))


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("function", [selective_scan, cross_selective_scan])
def test_compile_forward_and_backward(backend, function):
    make = selective_inputs(33, states=2) if function is selective_scan else map_inputs(3, 5)
    tensors = {n: t.float().requires_grad_() for n, t in make.items()}

    def loss(tensors):
        return function(**tensors, delta_softplus=True, backend=backend).square().sum()

    inputs = list(tensors.values())
    expected = torch.autograd.grad(loss(tensors), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, of in zip(torch.autograd.grad(compiled(tensors), inputs), expected, strict=True):
        torch.testing.assert_close(got, of, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_states_alone():
    given = map_inputs(6, 7, 8, dtype=torch.float32)
    given["x"], given["projected"] = given["x"].bfloat16(), given["projected"].bfloat16()
    for backend in ("chunked", "cpu"):
        expected = cross_selective_scan(**given, delta_softplus=True, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            out = cross_selective_scan(**given, delta_softplus=True, backend=backend)
        assert torch.equal(out, expected)


class Scan(nn.Module):
    """A scan of four sequences or of the map itself, from a map (B, H, W, 8)."""

    def __init__(self, states: int) -> None:
        super().__init__()
        given = map_inputs(2, 2, 8, states, 2, dtype=torch.float32)
        names = ("delta_weight", "A", "D", "delta_bias")
        self.given = nn.ParameterDict({n: nn.Parameter(given[n]) for n in names})
        self.project = nn.Linear(8, 4 * (2 + 2 * states))

    def forward(self, x: Tensor) -> Tensor:
        return cross_selective_scan(x, self.project(x), **self.given, delta_softplus=True)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(
    ("states", "any_size"),
    [
        (2, False),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(16, True, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnx(states, any_size):
    """Maps of any size, and of one size."""
    layer = Scan(states).eval()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC},) if any_size else None
    program = torch.onnx.export(
        layer, (torch.randn(2, 5, 8, 8),), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (argument.name for argument in session.get_inputs())
    for size in ((1, 3, 4), (3, 24, 25), (2, 5, 8)) if any_size else ((2, 5, 8),):
        x = torch.randn(*size, 8)
        (out,) = session.run(None, {name: x.numpy()})
        assert difference(torch.from_numpy(out), layer(x).double()) < 1e-5


def test_without_a_library(monkeypatch):
    missing = build.LibraryState(None, None, "portable", "no C++ compiler found")
    forget_kernels(monkeypatch)
    monkeypatch.setitem(build.process.states, "selective_scan", missing)
    given = selective_inputs(9, dtype=torch.float32)
    assert cpu.supports(given["u"], given["A"]) == missing.reason
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        cpu.scan(**given, delta_softplus=True)
    expected = chunked.scan(**selective_inputs(9), delta_softplus=True)
    assert difference(selective_scan(**given, delta_softplus=True), expected) < 1e-6
