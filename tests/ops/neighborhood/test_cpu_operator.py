"""The compiled CPU kernel as a torch operator, and on other CPUs."""

import itertools

import pytest
import torch
from compiled_kernels import compiled_for, forget_kernels, using_threads
from neighborhood_oracle import Limits, assert_exact, normal_inputs, random_case

from ops.cpu import build, instruction_sets
from ops.neighborhood import cpu, na1d, na2d
from ops.neighborhood._geometry import NAParams


def test_where_it_is_available():
    query, key, value = normal_inputs(9, 9)
    params = NAParams((3, 3), (1, 1), (1, 1), (False, False), 1.0)

    def reason(*tensors):
        return cpu.unavailable(*tensors, None, None, None, params)

    assert reason(query, key, value) is None
    assert "float64" in reason(query.double(), key.double(), value.double())
    assert "meta" in reason(query.to("meta"), key.to("meta"), value.to("meta"))
    wide = torch.zeros(1, 9, 9, 1, 513)
    assert "513" in reason(wide, wide, wide)


def test_repeated_calls_are_the_first_ones():
    """What they come to is remembered by all that it depends on, but for the numbers."""
    query, key, value = normal_inputs(9, 12)
    table = torch.randn(2, 5, 5)
    for scale, rpb in itertools.product((0.3, 1, True), (None, table, table.bfloat16())):
        for layout in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
            inputs = [layout(t) for t in (query, key, value)]
            for _ in range(2):
                out = na2d(*inputs, (3, 3), scale=scale, rpb=rpb, backend="cpu")
                expected = na2d(*inputs, (3, 3), scale=scale, rpb=rpb, backend="reference")
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="kernel_size must be an integer"):
        na2d(query, key, value, (3.0, 3), backend="cpu")
    with using_threads(2):
        assert torch.equal(
            na2d(query, key, value, [3, 3], backend="cpu"), na2d(query, key, value, 3)
        )


def test_without_a_library(monkeypatch):
    missing = build.LibraryState(None, None, "portable", "no C++ compiler found")
    forget_kernels(monkeypatch)
    monkeypatch.setitem(build.process.states, "neighborhood", missing)
    query, key, value = normal_inputs(9, 9)
    params = NAParams((3, 3), (1, 1), (1, 1), (False, False), 1.0)
    assert cpu.unavailable(query, key, value, None, None, None, params) == missing.reason
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        cpu.attend(query, key, value, None, None, None, params)
    assert na2d(query, key, value, 3).shape == query.shape  # another backend does it


def _operator_arguments(rank, dtype=torch.float32, optional=True):
    size = (9, 8, 7)[:rank]
    query, key, value = (
        t.requires_grad_() for t in normal_inputs(*size, heads=2, dim=5, dtype=dtype)
    )
    extra = [torch.randn(2, 3, 2, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
    rpb = torch.randn(2, *([5] * rank), requires_grad=True)
    tensors = (
        (query, key, value, *extra, rpb) if optional else (query, key, value, None, None, None)
    )
    geometry = ([3] * rank, [2] + [1] * (rank - 1), [1] * (rank - 1) + [2], [False] * rank, 0.4)
    return (*tensors, *geometry)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(rank, optional):
    arguments = _operator_arguments(rank, optional=optional)
    torch.library.opcheck(torch.ops.vision_backbones.na_cpu_forward, arguments)
    out, lse = torch.ops.vision_backbones.na_cpu_forward(*arguments)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    torch.library.opcheck(
        torch.ops.vision_backbones.na_cpu_backward,
        (torch.randn_like(out), torch.randn_like(lse), out.detach(), lse.detach(), *detached),
    )


def test_export_with_a_dynamic_batch():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return na2d(query, key, value, 3, backend="cpu")

    inputs = tuple(normal_inputs(8, 9))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Attention(), inputs, dynamic_shapes=[{0: batch}] * 3)
    more = tuple(torch.cat([t, t, t]) for t in inputs)
    assert torch.equal(exported.module()(*more), Attention()(*more))


def test_no_second_derivative():
    query, key, value = (t.requires_grad_() for t in normal_inputs(9))
    (grad,) = torch.autograd.grad(
        na1d(query, key, value, 3, backend="cpu").square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa, monkeypatch):
    """The plainer builds of the kernel, which this CPU would not choose, are exact too."""
    if isa not in instruction_sets.candidates()[1:]:
        return  # the other tests ran on it
    compiled_for(isa, monkeypatch)
    assert build.status("neighborhood").instruction_set == isa
    for seed in range(40):
        assert_exact(random_case(seed), "cpu")
    wide = Limits(max_size={1: 200, 2: 26, 3: 9}, dims=(1, 7, 16, 20, 32))
    for seed in range(1000, 1006):
        assert_exact(random_case(seed, wide), "cpu")
