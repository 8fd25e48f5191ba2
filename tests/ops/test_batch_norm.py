"""Gradients of batch norm do not depend on how the strides of a map are written."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from compiled_kernels import random
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchvision.models.feature_extraction import create_feature_extractor
from zoo import randomise

from ops.batch_norm import BatchNorm2d, has_wrong_gradients
from ops.conv import ConvNorm

SHAPES = [(1, 3, 4, 5), (2, 3, 1, 5), (1, 3, 4, 1), (1, 3, 1, 1), (1, 1, 4, 5), (2, 3, 4, 5)]


def norm(kind: type[nn.BatchNorm2d] = BatchNorm2d, dim: int = 3) -> nn.BatchNorm2d:
    layer = randomise(kind(dim))
    assert isinstance(layer, nn.BatchNorm2d)
    return layer.eval()


def layouts(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Both memory formats, with some strides that a dimension of size 1 may have."""
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        strides, step = [0] * 4, 1
        for axis in reversed(order):
            strides[axis], step = step, step * shape[axis]
        ones = [axis for axis in range(4) if shape[axis] == 1]
        for chosen in itertools.product((None, shape[1]), repeat=len(ones)):
            changed = dict(zip(ones, chosen, strict=True))
            yield tuple(changed.get(i) or stride for i, stride in enumerate(strides))


def of_tokens(x: Tensor) -> Tensor:
    """What sends back the gradient that torch's norm misreads."""
    return x.flatten(2).transpose(1, 2).cumsum(2).sin()


def both(
    layer: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Gradients of the input and of the parameters; ``run`` does as ``of_tokens(layer(x))``."""
    x = x.detach().clone().requires_grad_()
    out = of_tokens(layer(x)) if run is None else run(x)
    return list(torch.autograd.grad(out.sum(), [x, *layer.parameters()]))


def by_batch(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The same, where torch makes no mistake: a second image that does not count."""
    pair = torch.cat([x, x.flip(3)]).requires_grad_()
    out = of_tokens(layer(pair))[:1]
    first, *others = torch.autograd.grad(out.sum(), [pair, *layer.parameters()])
    return [first[:1], *others]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_strides(shape: tuple[int, ...], training: bool, dtype: torch.dtype) -> None:
    if training and shape[0] * shape[2] * shape[3] == 1:
        pytest.raises(ValueError, norm().train(), torch.zeros(shape))
        return
    layer = norm(dim=shape[1]).to(dtype).train(training)
    values, slope = random(2, *shape).to(dtype)
    bounds = {"atol": 0.03, "rtol": 0.02} if dtype.itemsize == 2 else {"atol": 1e-5, "rtol": 1e-5}
    wanted: tuple[Tensor, ...] | None = None
    for strides in layouts(shape):
        x = torch.empty_strided(shape, strides, dtype=dtype).copy_(values).requires_grad_()
        out, inputs = layer(x), [x, *layer.parameters()]
        torch.testing.assert_close(out, layer(values), **bounds)
        for others in layouts(shape):
            sent = torch.empty_strided(shape, others, dtype=dtype).copy_(slope)
            found = torch.autograd.grad(out, inputs, sent, retain_graph=True)
            wanted = wanted or found
            torch.testing.assert_close(found, wanted, **bounds)


def test_has_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 4, 5)
    plain, wanted = both(norm(nn.BatchNorm2d), x), by_batch(norm(nn.BatchNorm2d), x)
    wrong = any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, wanted, strict=True))
    assert has_wrong_gradients() == wrong
    torch.testing.assert_close(both(norm(), x), wanted)
    monkeypatch.setattr(nn, "BatchNorm2d", BatchNorm2d)
    assert not has_wrong_gradients()


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
# torch's own inductor decorates with the deprecated torch.jit when it is first imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled(backend: str) -> None:
    """The layer alone, and with what sends the gradient back."""
    torch.compiler.reset()
    layer, x = norm(), torch.randn(1, 3, 4, 5)
    alone = torch.compile(layer, backend=backend, fullgraph=True)
    whole = torch.compile(lambda x: of_tokens(layer(x)), backend=backend, fullgraph=True)
    wanted = by_batch(layer, x)
    torch.testing.assert_close(both(layer, x, lambda x: of_tokens(alone(x))), wanted)
    torch.testing.assert_close(both(layer, x, whole), wanted)


def test_symbolically_traced_as_a_layer() -> None:
    """As torch's own, by torch.fx and what is built on it."""
    model = randomise(nn.Sequential(ConvNorm(3, 4), nn.GELU())).eval()
    x = torch.randn(1, 3, 4, 5)
    traced = torch.fx.symbolic_trace(model)
    assert "0.norm" in {n.target for n in traced.graph.nodes if n.op == "call_module"}
    torch.testing.assert_close(both(model, x, lambda x: of_tokens(traced(x))), by_batch(model, x))
    (taken,) = create_feature_extractor(model, ["0.norm"])(x).values()
    torch.testing.assert_close(taken, model[0](x))


def test_gradients_of_each_image_by_vmap() -> None:
    layer, x = norm(), torch.randn(3, 3, 4, 5)
    state = dict(layer.named_parameters())

    def loss(state: dict[str, Tensor], image: Tensor) -> Tensor:
        return of_tokens(functional_call(layer, state, (image.unsqueeze(0),))).sum()

    found = vmap(grad(loss), (None, 0))(state, x)
    for i, image in enumerate(x.split(1)):
        wanted = dict(zip(state, both(layer, image)[1:], strict=True))
        torch.testing.assert_close({name: g[i] for name, g in found.items()}, wanted)


def test_second_derivatives() -> None:
    layer = norm().double()
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    for given in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        # gradcheck also sends back no gradient at all.
        assert torch.autograd.gradcheck(lambda x: of_tokens(layer(x)), given)
        assert torch.autograd.gradgradcheck(lambda x: of_tokens(layer(x)), given)


def test_otherwise_equals_torchs_norm() -> None:
    layer, x = norm(), torch.randn(2, 3, 4, 5)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        plain = norm(nn.BatchNorm2d)
        plain.load_state_dict(copied.state_dict())
        assert repr(copied) == repr(plain)
        assert torch.equal(copied.train()(x), plain.train()(x))
        assert torch.equal(copied.running_mean, plain.running_mean)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(x[0])
