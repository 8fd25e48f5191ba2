"""Bi-WKV: every backend computes the closed form and its derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ops.bi_wkv import bi_wkv

LENGTHS = (1, 2, 5, 31, 32, 33, 64, 196, 400)
BOTH_FORMS = pytest.mark.parametrize("segments", [None, 32])
FAST = ["chunked", "cpu"]  # test_triton.py tests the other one


def inputs(tokens: int, *, batch: int = 2, dim: int = 11, dtype: torch.dtype = torch.float64):
    """Key, value, decay and first; decays from the ends of the published initialisation."""
    generator = torch.Generator().manual_seed(tokens)
    key, value = torch.randn(2, batch, tokens, dim, generator=generator, dtype=torch.float64)
    decay = torch.linspace(-5, 3, dim, dtype=torch.float64) / tokens
    first = torch.randn(dim, generator=generator, dtype=torch.float64) / tokens
    return [t.to(dtype).requires_grad_() for t in (key, value, decay, first)]


def gradients(out: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True)


def by_hand(tokens: list[Tensor], t: int, segments: int | None) -> Tensor:
    """Output of token t of the first image and channel, sum by sum."""
    key, value, decay, first = (x.detach() for x in tokens)
    key, value, w, u = key[0, :, 0], value[0, :, 0], float(decay[0]), float(first[0])
    length = 1 if segments is None else math.ceil(len(key) / segments)
    begin = t if segments is None else t // length * length
    numerator = denominator = 0.0
    for i in range(len(key)):
        if i == t:
            weight = math.exp(u + key[t])
        elif segments is None or begin <= i < t:
            weight = math.exp(key[i] - w * (abs(t - i) - 1))
        else:
            weight = math.exp(key[i] - w * abs(t - i))
        if begin < i <= t:
            weight -= (math.exp(w) - 1) * math.exp(key[i] + w * (t - i))
        numerator += weight * value[i]
        denominator += weight
    return numerator / denominator


@pytest.mark.parametrize("segments", [None, 3])
def test_reference_is_the_closed_form(segments: int | None) -> None:
    tokens = inputs(13)
    out = bi_wkv(*tokens, segments, backend="reference")
    for t in range(13):
        torch.testing.assert_close(out[0, t, 0], by_hand(tokens, t, segments))


@pytest.mark.parametrize("tokens", LENGTHS)
@BOTH_FORMS
@pytest.mark.parametrize("backend", FAST)
def test_outputs_and_gradients(tokens: int, segments: int | None, backend: str) -> None:
    exact = inputs(tokens)
    expected = bi_wkv(*exact, segments, backend="reference")
    single = [t.detach().float().requires_grad_() for t in exact]
    out = bi_wkv(*single, segments, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=3e-6)
    for got, want in zip(gradients(out, single), gradients(expected, exact), strict=True):
        assert (got - want).abs().max() <= 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("segments", [None, 3])
def test_gradcheck(segments: int | None) -> None:
    tokens = inputs(10, batch=1, dim=2)
    assert torch.autograd.gradcheck(lambda *t: bi_wkv(*t, segments), tokens)
    assert torch.autograd.gradgradcheck(lambda *t: bi_wkv(*t, segments), inputs(5, batch=1, dim=1))


@BOTH_FORMS
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_decay_of_zero_has_a_gradient(segments: int | None, backend: str) -> None:
    key, value, _, first = inputs(70, dim=3)
    decay = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (expected,) = gradients(bi_wkv(key, value, decay, first, segments, "reference"), [decay])
    single = [t.detach().float().requires_grad_() for t in (key, value, decay, first)]
    (grad,) = gradients(bi_wkv(*single, segments, backend), [single[2]])
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [80.0, 1e4])
@pytest.mark.parametrize("step", [0.0, 3.0, -3.0, 200.0, -200.0])
def test_extreme_keys_and_decays(backend: str, scale: float, step: float) -> None:
    key, value, _, first = (t.detach() for t in inputs(45))
    exact = [key * scale, value, torch.full_like(first, step), first * 50]
    exact = [t.float().double().requires_grad_() for t in exact]
    expected = bi_wkv(*exact, backend="reference")
    single = [t.detach().float().requires_grad_() for t in exact]
    out = bi_wkv(*single, backend=backend)
    # Exponents of up to 1e4 are known to 1e-3 in float32.
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    for got, want in zip(gradients(out, single), gradients(expected, exact), strict=True):
        assert got.isfinite().all()
        assert (got - want).abs().max() <= 2e-2 * max(1, want.abs().max())


@pytest.mark.parametrize("backend", FAST)
def test_large_decays_with_segments(backend: str) -> None:
    """Sums that cancel; they are as large as the exponential of a segment."""
    key, value, _, first = (t.detach() for t in inputs(100))
    decay = torch.linspace(-40, 40, 11, dtype=torch.float64)
    exact = [key, value, decay, first]
    expected = bi_wkv(*exact, 32, backend="reference")
    out = bi_wkv(*(t.float() for t in exact), 32, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@BOTH_FORMS
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_half_precision_is_computed_in_float32(segments: int | None, backend: str) -> None:
    half = [t.detach().requires_grad_() for t in inputs(50, dtype=torch.bfloat16)]
    single = [t.detach().float().requires_grad_() for t in half]
    out, expected = bi_wkv(*half, segments, backend), bi_wkv(*single, segments, backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-4)
    for got, want in zip(gradients(out.float(), half), gradients(expected, single), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).abs().max() <= 2e-2 * want.abs().max()


class Layer(torch.nn.Module):
    def __init__(self, segments: int | None) -> None:
        super().__init__()
        self.segments = segments

    def forward(self, *tokens: Tensor) -> Tensor:
        return bi_wkv(*tokens, self.segments)


@pytest.mark.parametrize("segments", [32])
def test_export_for_any_number_of_tokens(segments: int | None) -> None:
    any_size = torch.export.Dim("tokens", min=2, max=4096)
    tokens = tuple(t.detach() for t in inputs(40))
    sizes = ({1: any_size}, {1: any_size}, None, None)
    program = torch.export.export(Layer(segments), tokens, dynamic_shapes=(sizes,))
    for count in (2, 33, 100):
        others = [t.detach() for t in inputs(count)]
        torch.testing.assert_close(program.module()(*others), Layer(segments)(*others))


@pytest.mark.parametrize("masked", ["head", "tail", "most", "all but one"])
@BOTH_FORMS
@pytest.mark.parametrize("backend", FAST)
def test_masked_tokens(backend: str, segments: int | None, masked: str) -> None:
    """They have no weight and no gradient, wherever they are."""
    key, value, decay, first = (t.detach() for t in inputs(45))
    position = torch.arange(45)[:, None]
    mask = {
        "head": position < 20,
        "tail": position >= 40,
        "most": torch.rand(45, 1, generator=torch.Generator().manual_seed(0)) < 0.6,
        "all but one": position != 7,
    }[masked]
    key[0].masked_fill_(mask, -torch.inf)  # in one image
    exact = [t.requires_grad_() for t in (key, value, decay, first)]
    expected = bi_wkv(*exact, segments, backend="reference")
    single = [t.detach().float().requires_grad_() for t in exact]
    out = bi_wkv(*single, segments, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=3e-6)
    got, wanted = gradients(out, single), gradients(expected, exact)
    for grad, want in zip(got, wanted, strict=True):
        assert (grad - want).abs().max() <= 2e-5 * max(1, want.abs().max())
    for grad in got[:2]:  # the kernel's exponentials end at the smallest normal number
        assert grad[0].masked_select(mask).abs().max() < 1e-30


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_an_image_without_tokens_that_count(backend: str) -> None:
    """It is NaN, as a softmax over nothing is; the other images are as they would be alone."""
    tokens = [t.detach().float() for t in inputs(20)]
    tokens[0][1] = -torch.inf
    out = bi_wkv(*tokens, backend=backend)
    assert out[1].isnan().all()
    alone = bi_wkv(tokens[0][:1], tokens[1][:1], *tokens[2:], backend=backend)
    torch.testing.assert_close(out[:1], alone)


@BOTH_FORMS
@pytest.mark.parametrize("backend", [None, "reference", *FAST])
def test_nothing_to_scan(segments: int | None, backend: str | None) -> None:
    empty = inputs(0), inputs(7, batch=0), inputs(7, dim=0)
    for dtype, tensors in itertools.product((torch.float32, torch.bfloat16), empty):
        key, value, *rest = (t.detach().to(dtype).requires_grad_() for t in tensors)
        tokens = [key, value, *(t.detach().float().requires_grad_() for t in rest)]
        out = bi_wkv(*tokens, segments, backend)
        assert out.shape == key.shape and out.dtype == dtype
        for grad, token in zip(torch.autograd.grad(out.sum(), tokens), tokens, strict=True):
            assert torch.equal(grad, torch.zeros_like(token))


def test_rejects_bad_arguments() -> None:
    key, value, decay, first = (t.detach() for t in inputs(7))
    for arguments, words in (
        ((key[0], value[0], decay, first), r"\(7, 11\)"),
        ((key, value[:, 1:], decay, first), r"\(2, 6, 11\)"),
        ((key, value, decay[1:], first), r"\(10,\)"),
        ((key, value, decay, first[None]), r"\(1, 11\)"),
        ((key.long(), value, decay, first), "torch.int64"),
        ((key, value.float(), decay, first), "torch.float32"),
        ((key, value.to("meta"), decay, first), "meta"),
        ((key, value, decay, first, 0), "got 0"),
        ((key, value, decay, first, 2.0), r"got 2\.0"),
        ((key, value, decay, first, True), "got True"),
        ((key, value, decay, first, 32, "cuda"), "'cuda'"),
    ):
        with pytest.raises(ValueError, match=words):
            bi_wkv(*arguments)
    for name, arguments in (
        ("key", (None, value, decay, first)),
        ("first", (key, value, decay, [0.0] * 11)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a tensor"):
            bi_wkv(*arguments)
