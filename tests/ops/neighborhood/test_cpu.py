"""The compiled CPU kernel: gradients, threads, memory, views, and where it is available."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from compiled_kernels import random, using_threads
from fresh_python import run_code
from neighborhood_oracle import NA, error, normal_inputs

from ops.cpu.neighborhood.attention import na_cpu_dynamic_mix
from ops.neighborhood import na1d, na2d, na2d_av

_MEMORY = """
import torch
from ops.neighborhood import na2d
from backbones.cli.timing import PeakMemory

def step(tensors, kernel_size, grad):
    out = na2d(*tensors, kernel_size, backend="cpu")
    return out, *torch.autograd.grad(out, tensors, grad)

torch.set_num_threads(1)
tiny, large = (torch.randn(3, 1, n, n, 4, 32).unbind() for n in (8, 96))
for t in (*tiny, *large):
    t.requires_grad_()
grad = torch.randn_like(large[0])
step(tiny, 3, torch.randn_like(tiny[0]))
inputs = sum(t.nbytes for t in large)
for kernel_size in (7, 25):
    with PeakMemory(torch.device("cpu")) as memory:
        results = step(large, kernel_size, grad)
    print((memory.bytes - sum(t.nbytes for t in results)) / inputs)
    del results
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_window(tmp_path):
    """What is held beyond the results; gathered windows would be 625 times the keys at 25 x 25."""
    narrow, wide = map(float, run_code(_MEMORY, tmp_path).split())
    # The lse, the scratch and the sums of the key gradients.
    assert 0 < narrow < 1 and 0 < wide < 1
    assert wide < narrow + 0.1


@pytest.mark.parametrize("window", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_spreads_to_the_queries_that_see_it_only(dtype, window):
    """Also where two numbers are multiplied at once, of which one is beyond the window."""
    query, key, value = (t.to(dtype) for t in normal_inputs(30))
    value[0, 10, 0, 0] = key[1, 20, 1, 3] = float("nan")
    out = na1d(query, key, value, window, backend="cpu")
    nan = out.isnan()
    first = 8 if window == 5 else 9
    assert nan[0, first:13, 0, 0].all() and nan[1, first + 10 : 23, 1].all()
    assert nan.sum() == window + window * out.shape[-1]


def test_expanded_and_transposed_views():
    query, key, value = normal_inputs(12, 20, heads=4)
    value = value[:1].expand(2, -1, -1, -1, -1)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = key.flip(1)[..., ::2].repeat_interleave(2, -1)[..., ::1].transpose(-1, -2)
    key = key.contiguous().transpose(-1, -2)
    out = na2d(query, key, value, 5, backend="cpu")
    same = na2d(query.contiguous(), key.contiguous(), value.contiguous(), 5, backend="cpu")
    assert torch.equal(out, same)


_OF_TWO_AXES = ((1, 1), (1, 1), (False, False))


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((70, 66), ((7, 7), *_OF_TWO_AXES)),
        ((70, 66), ((7, 5), (3, 5), (1, 1), (False, False))),
        ((67, 71), ((5, 6), (2, 3), (3, 2), (False, True))),
        ((90, 50), ((7, 7), (1, 1), (8, 5), (True, True))),
        ((80, 80), ((2, 2), (2, 2), (4, 3), (False, False))),
        ((130, 150), ((13, 11), *_OF_TWO_AXES)),  # heads together, see Layout
        ((3000,), ((63,), (5,), (1,), (False,))),
        ((6001,), ((31,), (1,), (7,), (True,))),
        ((6, 40, 44), ((3, 5, 7), (1, 2, 1), (1, 1, 2), (False, True, False))),
    ],
)
def test_gradients_where_units_of_work_share_keys(size, window):
    """Outputs, too, of maps too large for one, against another backend; threads change nothing."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, *size, h, 24, generator=generator).requires_grad_() for h in (4, 2, 2)
    ]
    grad = torch.randn(2, *size, 4, 24, generator=generator)
    tensors.append(torch.randn(4, *(2 * k - 1 for k in window[0]), generator=generator))
    tensors[3].requires_grad_()

    def gradients(backend, threads):
        with using_threads(threads):
            out = NA[len(size)](*tensors[:3], *window, rpb=tensors[3], backend=backend)
            return out, *torch.autograd.grad(out, tensors, grad)

    ours = gradients("cpu", 1)
    assert all(map(torch.equal, ours, gradients("cpu", 2)))
    others = gradients("tiled", 1)
    torch.testing.assert_close(ours[:4], others[:4], rtol=1e-5, atol=2e-5)
    assert error(ours[4], others[4]) <= 2e-5


@pytest.mark.parametrize("dim", [32, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_larger_than_the_caches(dtype, dim):
    """They are stored past them, where their channels fill whole cache lines."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(4, 90, 100, heads, dim, generator=generator).to(dtype) for heads in (4, 2, 2, 4)
    ]

    def results(query, key, value, grad):
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        out = na2d(*inputs, 3, backend="cpu")
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    together = results(*tensors)
    for i in range(4):  # an image alone fits
        alone = results(*(t[i : i + 1] for t in tensors))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


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
        na2d(query, key, value, (3.0, 3), scale=0.3, backend="cpu")
    with using_threads(2):
        assert torch.equal(
            na2d(query, key, value, [3, 3], backend="cpu"), na2d(query, key, value, 3)
        )


def _peak_of_temporaries(size: int, kernel_size: int) -> int:
    """Largest number of bytes that one forward and backward hold at once beyond its tensors."""
    tensors = [torch.randn(1, size, size, 2, 16, requires_grad=True) for _ in range(3)]

    def step() -> None:
        out = na2d(*tensors, kernel_size, backend="tiled")
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_memory_does_not_grow_with_the_windows_of_tiles() -> None:
    small, large = _peak_of_temporaries(64, 5), _peak_of_temporaries(64, 25)
    assert large < 1.5 * small, (small, large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "sizes", "dim", "depth"),
    [((14, 14), (5, 13), 16, 16), ((9, 60), (1, 8), 21, 5), ((31, 4), (4, 3), 40, 33)],
)
def test_dynamic_mixes(size, sizes, dim, depth, dtype) -> None:
    """Of maps whose heads lie side by side, with weights from near 0 to near 1."""
    heads, pixels = 3, size[0] * size[1]
    query = random(2, pixels, heads, depth).to(dtype).transpose(1, 2)
    key = random(2, heads, depth, 49, seed=1).to(dtype)
    weights = [random(49, k * k, seed=k).float() / 28 for k in sizes]
    biases = [2 * random(heads, *size, k * k, seed=k).to(dtype) for k in sizes]
    value = random(2, *size, 2, heads, dim, seed=2).to(dtype)
    values = [value[:, :, :, i].permute(0, 3, 1, 2, 4) for i in range(2)]
    out = na_cpu_dynamic_mix(query, key, weights, biases, values, sizes)
    assert out.dtype == dtype and out.is_contiguous()
    for weight, bias, v, k, part in zip(
        weights, biases, values, sizes, out.chunk(2, 3), strict=True
    ):
        products = (query.double() @ (key.double() @ weight.double())).unflatten(2, size)
        expected = na2d_av((products + bias.double()).softmax(-1), v.double(), k)
        error = (part.permute(0, 3, 1, 2, 4) - expected).abs().max()
        assert error <= (0.02 if dtype == torch.bfloat16 else 4e-6)
