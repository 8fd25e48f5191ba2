"""Which convolutions are joined to a stem, and that it computes what they do."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import conv_row, random, without_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ops import cpu
from ops.cpu import policy
from ops.mobile import conv_stem
from ops.rewriting.program import Program
from ops.rewriting.recorder import record
from ops.rewriting.rewrite import rewrite
from ops.rewriting.stem import Stem


def _program(model: nn.Module, x: Tensor) -> Program:
    graph = record(model.eval().requires_grad_(False), model, x)
    rewrite(graph)
    return Program(graph)


def _stems(program: Program) -> list[Stem]:
    functions = [operator.function for operator in program.graph.operators]
    return [function for function in functions if isinstance(function, Stem)]


ROWS, ACT = (conv_row(3, 8), conv_row(8, 16)), nn.ReLU()


@pytest.mark.parametrize(
    ("layers", "convs"),
    [
        ((*ROWS[0], ACT, *ROWS[1]), 2),
        ((*ROWS[0], LayerNorm2d(8), ACT, *ROWS[1], ACT), 2),
        ((*ROWS[0], LayerNorm2d(8), *ROWS[1], LayerNorm2d(16), *conv_row(16, 8)), 3),
        ((*ROWS[0], ACT, *ROWS[1], nn.Conv2d(16, 8, 3, 1, 1)), 2),
        (ROWS[0], 0),
        ((nn.Conv2d(3, 3, 1), *ROWS[0], *ROWS[1]), 0),
        ((*ROWS[0], ACT, LayerNorm2d(8), *ROWS[1]), 0),
        ((*ROWS[0], nn.Softplus(), *ROWS[1]), 0),
        ((*ROWS[0], nn.Conv2d(8, 16, 3, 1, 1)), 0),
        ((*ROWS[0], nn.Conv2d(8, 16, 3, 2, 1, groups=2)), 0),
        ((*ROWS[0], nn.Conv2d(8, 16, 3, 2, 1, dilation=2)), 0),
    ],
)
def test_what_is_a_stem(layers: tuple[nn.Module, ...], convs: int) -> None:
    model, x = nn.Sequential(*layers), random(2, 3, 33, 30).float()
    program = _program(model, x)
    assert [len(stem.convs) for stem in _stems(program)] == [convs] * (convs > 0)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_map_that_something_else_reads_ends_a_stem() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*conv_row(3, 8, 8, 8))

        def forward(self, x: Tensor) -> list[Tensor]:
            maps = []
            for layer in self.layers:
                x = layer(x)
                maps.append(x)
            return maps[1:]

    model, x = Network(), random(1, 3, 32, 32).float()
    program = _program(model, x)
    assert [len(stem.convs) for stem in _stems(program)] == [2]
    for made, expected in zip(program(x), model(x), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    channels=st.tuples(st.sampled_from([1, 3]), *[st.sampled_from([4, 20, 33, 70])] * 2),
    act_layer=st.sampled_from([nn.GELU, nn.ReLU, nn.Identity]),
)
def test_norms_between_the_layers(size, channels, act_layer) -> None:
    """With norms that differ, and convolutions without one."""
    first, second = conv_row(*channels)
    norms = [LayerNorm2d(n, eps=eps) for n, eps in zip(channels[1:], (1e-6, 1e-2), strict=True)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = random(2, channels[0], *size).float()
    for layers in (
        (first, norms[0], act_layer(), second, norms[1]),
        (first, act_layer(), second, norms[1], act_layer()),
    ):
        model = nn.Sequential(*layers)
        program = _program(model, x)
        assert len(_stems(program)) == 1
        made, expected = program(x), model.double()(x.double())
        assert (made - expected).abs().max() < 1e-4 * (1 + expected.abs().max())
        model.float()


def test_odd_channels_of_bfloat16_are_left_to_torch() -> None:
    floats = not policy.multiplies(torch.bfloat16)  # made of it on the way
    even = floats or cpu.instruction_set() != "amx"
    for channels, made in (((3, 16, 33), even), ((3, 15, 32), floats)):
        model, x = nn.Sequential(*conv_row(*channels)).bfloat16(), random(1, 3, 20, 20).bfloat16()
        program = _program(model, x)
        torch.testing.assert_close(program(x), model(x), rtol=0.05, atol=0.02)
        (stem,) = _stems(program)
        assert (stem.derived(x) is not None) == made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_with_and_without_the_kernel(dtype: torch.dtype, compiled: bool, monkeypatch) -> None:
    x = random(1, 3, 61, 64).to(dtype)
    model = conv_stem(3, 64).to(dtype)
    if not compiled:
        without_kernels(monkeypatch)
    close = (
        {"rtol": 0.05, "atol": 0.01} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(_program(model, x)(x), model(x), **close)
