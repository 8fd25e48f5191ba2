"""The compiled CPU kernel: exact against brute force and deterministic."""

import copy
import sys

import pytest
import torch
from compiled_kernels import using_threads
from fresh_python import run_code
from neighborhood_oracle import (
    NA,
    Case,
    Limits,
    assert_exact,
    normal_inputs,
    random_case,
)

from ops.neighborhood import na1d, na2d, na3d

LIMITS = Limits(dims=(1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 48, 64, 80, 127, 128))
# Maps wide enough for every way of fetching keys: whole vectors, permuted ones, gathered ones.
WIDE = Limits(max_size={1: 200, 2: 26, 3: 9}, dims=(1, 7, 16, 20, 32))


@pytest.mark.parametrize("seed", range(60))
def test_exact(seed):
    assert_exact(random_case(seed, LIMITS), "cpu")


@pytest.mark.parametrize("seed", range(1000, 1012))
def test_exact_on_wide_maps(seed):
    assert_exact(random_case(seed, WIDE), "cpu")


@pytest.mark.parametrize("seed", range(2000, 2015))
def test_bfloat16(seed):
    assert_exact(random_case(seed, LIMITS), "cpu", torch.bfloat16)


@pytest.mark.slow
def test_exact_sweep():
    for seed in range(3000, 3600):
        assert_exact(random_case(seed, LIMITS), "cpu")
    for seed in range(4000, 4150):
        assert_exact(random_case(seed, WIDE), "cpu")
    for seed in range(5000, 5100):
        assert_exact(random_case(seed, LIMITS), "cpu", torch.bfloat16)


_PLAIN = {"stride": (1, 1), "dilation": (1, 1), "is_causal": (False, False)}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case((300,), (200,), (1,), (1,), (False,), dim=8), id="many blocks in a row"),
        pytest.param(Case((300,), (150,), (7,), (2,), (True,), dim=8), id="many causal blocks"),
        pytest.param(Case((20, 20), (19, 17), dim=8, extra=300, **_PLAIN), id="many blocks"),
        pytest.param(Case((5, 300), (1, 3), (1, 1), (1, 100), (False, False)), id="far dilation"),
        pytest.param(Case((40, 1), (5, 1), dim=8, **_PLAIN), id="last axis of one"),
        pytest.param(Case((1, 40), (1, 4), dim=8, **_PLAIN), id="first axis of one, even kernel"),
        pytest.param(Case((17, 17), (17, 17), dim=512, value_dim=1, **_PLAIN), id="largest dim"),
        pytest.param(
            Case((30, 30), (7, 7), (1, 1), (4, 4), (False, True), has_rpb=True), id="n mod d"
        ),
        pytest.param(
            Case((60, 34), (7, 7), heads=2, kv_heads=2, dim=64, has_rpb=True, **_PLAIN),
            id="several chunks",
        ),
        pytest.param(
            Case(
                (1500,),
                (63,),
                (1,),
                (1,),
                (False,),
                heads=2,
                kv_heads=2,
                dim=80,
                value_dim=64,
                has_rpb=True,
            ),
            id="several segments",
        ),
        pytest.param(
            Case((60,), (40,), (1,), (1,), (False,), has_rpb=True, extra=2), id="gathered bias"
        ),
        pytest.param(
            Case((9, 9), (5, 5), (5, 5), (1, 1), (False, False), has_rpb=True),
            id="windows of a stride",
        ),
    ],
)
def test_corner(case):
    assert_exact(case, "cpu")


def _out_and_gradients(query, key, value, *rest, **named):
    tensors = [t.detach().requires_grad_() for t in (query, key, value)]
    rpb = named.get("rpb")
    if rpb is not None:
        named["rpb"] = rpb.detach().requires_grad_()
        tensors.append(named["rpb"])
    out, lse = na2d(*tensors[:3], *rest, return_lse=True, backend="cpu", **named)
    return [out, lse, *torch.autograd.grad((out * out.detach()).sum() + lse.sum(), tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_and_repetition_change_nothing(dtype):
    # Above the size from which more than one thread is used, and in several chunks.
    query, key, value = normal_inputs(80, 72, dim=32, dtype=dtype)
    rpb = torch.randn(2, 13, 13)
    if dtype == torch.bfloat16:
        rpb = rpb.bfloat16()
    results = []
    for threads in (1, 1, 2, 3):
        with using_threads(threads):
            results.append(_out_and_gradients(query, key, value, 7, rpb=rpb))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((70, 66), ((7, 7), (1, 1), (1, 1), (False, False))),
        ((70, 66), ((7, 5), (3, 5), (1, 1), (False, False))),
        ((67, 71), ((5, 6), (2, 3), (3, 2), (False, True))),
        ((90, 50), ((7, 7), (1, 1), (8, 5), (True, True))),
        ((80, 80), ((2, 2), (2, 2), (4, 3), (False, False))),
        ((130, 150), ((13, 11), (1, 1), (1, 1), (False, False))),  # heads together, see Layout
        ((3000,), ((63,), (5,), (1,), (False,))),
        ((6001,), ((31,), (1,), (7,), (True,))),
        ((6, 40, 44), ((3, 5, 7), (1, 2, 1), (1, 1, 2), (False, True, False))),
    ],
)
def test_gradients_where_units_of_work_share_keys(size, window):
    """Maps too large for one unit of work, against another backend; threads change nothing."""
    attend = (na1d, na2d, na3d)[len(size) - 1]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, *size, heads, 24, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    grad = torch.randn(query.shape, generator=generator)

    def gradients(backend, threads=1):
        with using_threads(threads):
            out = attend(query, key, value, *window, backend=backend)
            return torch.autograd.grad(out, (query, key, value), grad)

    ours, with_two, others = gradients("cpu"), gradients("cpu", 2), gradients("tiled")
    for a, b, other in zip(ours, with_two, others, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dim", [32, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_larger_than_the_caches(dtype, dim):
    """They are stored past them, where their channels fill whole cache lines."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(4, 90, 100, heads, dim, generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    together = na2d(query, key, value, 3, backend="cpu")
    with using_threads(2):
        assert torch.equal(na2d(query, key, value, 3, backend="cpu"), together)
    for i in range(4):  # an image alone fits
        one = slice(i, i + 1)
        alone = na2d(query[one], key[one], value[one], 3, backend="cpu")
        assert torch.equal(together[one], alone)


@pytest.mark.parametrize("dim", [32, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_larger_than_the_caches(dtype, dim):
    """They are stored past them, where their channels fill whole cache lines."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(4, 80, 100, heads, dim, generator=generator).to(dtype) for heads in (4, 2, 2, 4)
    ]

    def gradients(query, key, value, grad):
        inputs = [t.detach().requires_grad_() for t in (query, key, value)]
        return torch.autograd.grad(na2d(*inputs, 3, backend="cpu"), inputs, grad)

    together = gradients(*tensors)
    for i in range(4):  # an image alone fits
        alone = gradients(*(t[i : i + 1] for t in tensors))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dim", [16, 48, 20])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((200,), ((63,), (1,), (1,), (False,))),  # every column in more lanes than the last
        ((200,), ((16,), (1,), (1,), (True,))),
        ((200,), ((150,), (1,), (1,), (False,))),  # in two blocks
        ((30, 40), ((1, 15), (1, 1), (1, 1), (False, False))),  # windows narrower than the lanes
        ((30, 40), ((1, 21), (1, 1), (1, 1), (False, False))),
        ((31, 20), ((2, 5), (1, 1), (1, 1), (False, False))),  # stairs of query rows
        ((31, 20), ((3, 5), (1, 1), (1, 1), (False, False))),
        ((31, 20), ((13, 5), (1, 1), (1, 1), (False, False))),  # in two parts
        ((41, 20), ((25, 3), (1, 1), (1, 1), (True, False))),
    ],
)
def test_gradients_of_neighbouring_windows(size, window, dim):
    generator = torch.Generator().manual_seed(0)
    shape = (1, *size, 2, dim)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    attend = (na1d, na2d)[len(size) - 1]

    def gradients(dtype, backend):
        tensors = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        out = attend(*tensors, *window, backend=backend)
        return torch.autograd.grad(out, tensors, grad.to(dtype))

    ours, exact = gradients(torch.float32, "cpu"), gradients(torch.float64, "reference")
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


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


def test_bias_of_offsets_that_never_occur_has_no_gradient():
    query, key, value = normal_inputs(9, 12)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    na2d(query, key, value, 3, is_causal=True, rpb=rpb, backend="cpu").square().sum().backward()
    assert torch.count_nonzero(rpb.grad[:, 3:]) == torch.count_nonzero(rpb.grad[:, :, 3:]) == 0
    assert torch.count_nonzero(rpb.grad[:, :3, :3]) == 2 * 9


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


def test_deep_copied_and_ranked_calls_agree():
    """A map with axes of length one gives the same numbers in every rank."""
    query, key, value = normal_inputs(24)
    flat = na1d(query, key, value, 5, dilation=2, backend="cpu")
    in_2d = na2d(*(t[:, None] for t in (query, key, value)), (1, 5), dilation=(1, 2), backend="cpu")
    in_3d = na3d(
        *(copy.deepcopy(t)[:, None, None] for t in (query, key, value)),
        (1, 1, 5),
        dilation=(1, 1, 2),
        backend="cpu",
    )
    assert torch.equal(flat, in_2d[:, 0]) and torch.equal(flat, in_3d[:, 0, 0])
    assert set(NA) == {1, 2, 3}
