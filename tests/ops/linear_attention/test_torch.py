"""Gated linear attention in torch: operators, compilation, autocast, ONNX."""

from __future__ import annotations

import io

import onnxruntime
import pytest
import torch
from compiled_kernels import forget_kernels
from scan_inputs import cast, difference, inputs
from torch import Tensor, nn
from torch.export import Dim

from ops.cpu import build
from ops.linear_attention import chunked, cpu, gated_linear_attention


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional):
    given = inputs(9, back=optional, bonus=optional, dtype=torch.float32)
    tensors = [t if t is None else t.requires_grad_() for t in given.values()]
    operators = torch.ops.vision_backbones
    torch.library.opcheck(operators.gated_scan, (*tensors, 0.5))
    detached = [t if t is None else t.detach() for t in tensors[:5]]
    grad = torch.randn_like(detached[2])
    torch.library.opcheck(operators.gated_scan_backward, (grad, *detached, optional, 0.5))


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_compile_forward_and_backward(backend):
    given = inputs(33, bonus=True, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in given.values()]

    def loss(query, *others):
        return gated_linear_attention(query * 2, *others, backend=backend).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, of in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(got, of, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_states_alone():
    given = inputs(60, 16, 32, dtype=torch.bfloat16)
    given["log_gate"] = given["log_gate"].float()
    expected = gated_linear_attention(**given, backend="chunked")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_linear_attention(**given, backend="chunked"), expected)


class Scan(nn.Module):
    """Everything from one tensor (B, L, 2 · (4 · 8 + 16))."""

    def __init__(self, bonus: bool) -> None:
        super().__init__()
        self.bonus = nn.Parameter(torch.randn(2, 8)) if bonus else None

    def forward(self, x: Tensor) -> Tensor:
        *others, value = x.split([16, 16, 16, 16, 32], dim=-1)
        query, key, ahead, back = (t.unflatten(-1, (2, -1)) for t in others)
        gates = (-ahead.exp(), -back.exp())
        return gated_linear_attention(query, key, value.unflatten(-1, (2, -1)), *gates, self.bonus)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("bonus", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_onnx_with_any_number_of_tokens(bonus):
    layer = Scan(bonus).eval()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = torch.onnx.export(
        layer, (torch.randn(2, 40, 96),), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (argument.name for argument in session.get_inputs())
    for batch, tokens in ((1, 7), (3, 100), (2, 196)):
        x = torch.randn(batch, tokens, 96)
        (out,) = session.run(None, {name: x.numpy()})
        assert difference(torch.from_numpy(out), layer(x).double()) < 1e-5


def test_without_a_library(monkeypatch):
    missing = build.LibraryState(None, None, "portable", "no C++ compiler found")
    forget_kernels(monkeypatch)
    monkeypatch.setitem(build.process.states, "gated_scan", missing)
    given = inputs(9, dtype=torch.float32)
    assert cpu.supports(*given.values()) == missing.reason
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        cpu.attend(**given, scale=1.0)
    expected = chunked.attend(**cast(given, torch.float64), scale=8**-0.5)
    assert difference(gated_linear_attention(**given), expected) < 1e-6
