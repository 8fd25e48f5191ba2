"""The bi-WKV kernel in torch: gates, bfloat16, threads, bad arguments."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import random
from torch import Tensor

from ops.bi_wkv import bi_wkv
from ops.cpu.wkv.bi_wkv import bi_wkv_forward


def inputs(tokens: int = 30, dim: int = 21, batch: int = 2) -> list[Tensor]:
    key, value = random(2, batch, tokens, dim).float()
    decay, first = random(2, dim, seed=1).float() / tokens
    return [key, value, decay, first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [0, 4])
def test_a_gate(dtype: torch.dtype, segments: int) -> None:
    key, value, decay, first = inputs()
    key, value, gate = (t.to(dtype) for t in (key, value, 5 * random(2, 30, 21, seed=2)))
    exact = [t.double() for t in (key, value, decay, first)]
    expected = gate.double().sigmoid() * bi_wkv(*exact, segments or None, "reference")
    out = bi_wkv_forward(key, value, decay, first, gate, segments)
    assert out.dtype == dtype
    bound = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)


def test_a_gate_has_a_gradient_and_saturates() -> None:
    key, value, decay, first = (t.requires_grad_() for t in inputs())
    gate = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4]).repeat(2, 30, 5)[..., :21].requires_grad_()
    out = torch.ops.vision_backbones.bi_wkv_forward(key, value, decay, first, gate, 4)
    expected = bi_wkv(key, value, decay, first, 4) * gate.sigmoid()
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        kernel = bi_wkv_forward(key, value, decay, first, gate, 4)
    torch.testing.assert_close(kernel, expected, rtol=2e-6, atol=2e-6)
    got, want = (torch.autograd.grad(o.square().sum(), [key, gate]) for o in (out, expected))
    torch.testing.assert_close(got, want)


def test_extreme_decays_stay_within_their_channel() -> None:
    """Blocks of channels are computed in one of two ways, as their decays want."""
    key, value, decay, first = inputs(40, 8)
    mild = bi_wkv_forward(key, value, decay, first, None, 0)
    decay[3] = 50.0
    wild = bi_wkv_forward(key, value, decay, first, None, 0)
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(wild[..., others], mild[..., others], rtol=2e-6, atol=2e-6)


def test_nan_propagates() -> None:
    key, value, decay, first = inputs()
    key[0, 3, 5] = torch.nan
    out = bi_wkv_forward(key, value, decay, first, None, 0)
    assert out[0, :, 5].isnan().all()
    assert out.isnan().sum() == 30


def test_opcheck() -> None:
    tokens = [t.requires_grad_() for t in inputs(5, 3)]
    torch.library.opcheck(torch.ops.vision_backbones.bi_wkv_forward, (*tokens, None, 3))
    detached = [t.detach() for t in tokens]
    grad = torch.ones_like(detached[0])
    torch.library.opcheck(torch.ops.vision_backbones.bi_wkv_backward, (grad, *detached, 3))


def test_no_second_derivative() -> None:
    tokens = [t.requires_grad_() for t in inputs(9, 5)]
    out = bi_wkv(*tokens, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), tokens[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rejects_bad_arguments() -> None:
    key, value, decay, first = inputs()
    for arguments, words in (
        ((key, value[:1], decay, first, None, 0), r"\(1, 30, 21\)"),
        ((key, value, decay[1:], first, None, 0), r"\(20,\)"),
        ((key, value, decay, first, None, -1), "got -1"),
        ((key, value, decay.double(), first, None, 0), "torch.float64"),
        ((key, value.bfloat16(), decay, first, None, 0), "torch.bfloat16"),
        ((key, value, decay, first, key[:, 1:], 0), r"\(2, 29, 21\)"),
    ):
        with pytest.raises(ValueError, match=words):
            bi_wkv_forward(*arguments)
