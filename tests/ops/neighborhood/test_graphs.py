"""Neighborhood attention in graphs: operators, torch.compile, export, ONNX, autocast, meta."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from neighborhood_oracle import normal_inputs
from torch import Tensor, nn
from torch.export import Dim

from backbones import create_model
from ops.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na1d,
    na2d,
    na3d,
    tiled,
)

# What torch's exporter says of torch's own use of itself, and inductor of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]
SLOW = pytest.mark.slow
PORTABLE = ("reference", "tiled", None)
RANKS = {1: na1d, 2: na2d, 3: na3d}


def _tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


# ---- operators ---------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("optional", [False, True])
def test_operators_of_the_kernel(rank: int, optional: bool) -> None:
    operators, size = torch.ops.vision_backbones, (9, 8, 7)[:rank]
    given: list[Any] = [t.requires_grad_() for t in normal_inputs(*size, heads=2, dim=5)]
    more: list[Any] = [*torch.randn(2, 2, 3, 2, 5), torch.randn(2, *[5] * rank)]
    given += [t.requires_grad_() for t in more] if optional else [None] * 3
    given += [[3] * rank, [2] + [1] * (rank - 1), [1] * (rank - 1) + [2], [False] * rank, 0.4]
    torch.library.opcheck(operators.na_cpu_forward, (*given, True))
    out, lse = (t.detach() for t in operators.na_cpu_forward(*given, True))
    detached = [t.detach() if isinstance(t, Tensor) else t for t in given]
    grads = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(operators.na_cpu_backward, (*grads, out, lse, *detached))


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_operator_of_tiles(full: bool, return_lse: bool) -> None:
    keys, value_dim = (32, 5) if full else (30, 4)  # of the map, and two more
    shapes = [(2, 5, 6, 2, 4), (2, keys, 2, 4), (2, keys, 2, value_dim), *[(2, 5, 3)] * full]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    windows = ([3, 2], [1, 2], [1, 2], [True, False])
    rpb = () if full else (None,)
    torch.library.opcheck(tiled._attend, (*tensors, *rpb, *windows, 0.3, return_lse))


def test_second_derivatives() -> None:
    """The reference has some; others refuse instead of giving wrong ones."""
    exact = torch.randn(1, 5, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda q: na1d(q, q, q, 3, backend="reference"), exact)
    for backend in ("tiled", "cpu"):
        query = torch.randn(1, 6, 1, 4, requires_grad=True)
        out = na1d(query, query, query, 3, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


# ---- torch.compile -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "rank", "dynamic", "by"),
    [
        *[("tiled", 2, True, "aot_eager"), (None, 2, True, "aot_eager")],
        ("reference", 1, None, "aot_eager"),
        *(pytest.param(b, 2, False, "aot_eager", marks=SLOW) for b in ("tiled", None)),
        *(pytest.param(b, r, None, "inductor", marks=SLOW) for b in PORTABLE for r in RANKS),
    ],
)
def test_compile(backend: str | None, rank: int, dynamic: bool | None, by: str) -> None:
    torch._dynamo.reset()
    # Inductor rounds the reference's own sums elsewhere.
    dtype = torch.float64 if backend == "reference" else torch.float32

    def loss(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        kwargs = {"dilation": 2, "is_causal": (True, False, False)[:rank], "rpb": rpb}
        attend = functools.partial(RANKS[rank], query * 2, key, value, backend=backend)
        out, lse = attend(3, **kwargs, return_lse=True)
        return out.square().sum() + lse.sin().sum() + attend((3, 4, 3)[:rank], stride=2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=by, dynamic=dynamic)
    for size in ((9, 8, 6), (7, 12, 7))[: 2 if rank == 2 else 1]:
        inputs = [t.requires_grad_() for t in _tensors(2, *size[:rank], 3, 8, dtype=dtype)]
        inputs.append(torch.randn(3, *(5,) * rank, dtype=dtype, requires_grad=True))
        found, true = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("small_maps", ["shrink", "pad"])
def test_compile_layers_for_small_maps_of_any_size(small_maps: str, backend: str) -> None:
    torch._dynamo.reset()
    options = {"is_causal": (True, False), "rel_pos_bias": True, "small_maps": small_maps}
    layer = NeighborhoodAttention2D(8, 2, 5, **options).eval()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for size in ((4, 6), (8, 3), (9, 9)):
        x = torch.randn(1, *size, 8)
        torch.testing.assert_close(compiled(x), layer(x))


# ---- torch.export and ONNX ---------------------------------------------------------------------
class _Attention(nn.Module):
    def __init__(self, rank: int, backend: str | None = None, **window: Any) -> None:
        super().__init__()
        self.attention, self.options = RANKS[rank], {**window, "backend": backend}

    def forward(self, query: Tensor) -> Any:
        return self.attention(query, query, query, 3, **self.options)


@pytest.mark.parametrize(
    ("rank", "strict"), [pytest.param(1, True, marks=pytest.mark.slow), (2, False)]
)
def test_export_with_dynamic_sizes(rank: int, strict: bool) -> None:
    causal = (True, *(False,) * (rank - 1))
    module = _Attention(rank, stride=2, dilation=2, is_causal=causal, return_lse=True)
    axes = {0: Dim("batch"), **{i + 1: Dim(f"n{i}", min=6) for i in range(rank)}}
    example = torch.randn(2, *(7, 8, 9)[:rank], 2, 4)
    program = torch.export.export(module, (example,), dynamic_shapes=(axes,), strict=strict)
    # Plain torch operators only, which every runtime and the ONNX exporter know.
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    spaces = {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
    assert spaces == {"aten"}
    for size in ((7, 8, 9), (6, 13, 10)):
        query = torch.randn(3, *size[:rank], 2, 4)
        torch.testing.assert_close(program.module()(query), module(query))


def test_export_of_the_kernel_with_a_dynamic_batch() -> None:
    module, query = _Attention(2, "cpu"), torch.randn(2, 8, 9, 2, 16)
    batch = {0: Dim("batch", min=1, max=64)}
    program = torch.export.export(module, (query,), dynamic_shapes=(batch,))
    more = torch.cat([query] * 3)
    assert torch.equal(program.module()(more), module(more))


def test_export_of_a_layer_without_a_least_size() -> None:
    options = {"is_causal": (True, False), "rel_pos_bias": True, "small_maps": "shrink"}
    layer = NeighborhoodAttention2D(8, 2, 3, **options).eval()
    dynamic = dict.fromkeys(range(3), Dim.DYNAMIC)
    program = torch.export.export(layer, (torch.randn(2, 5, 6, 8),), dynamic_shapes=(dynamic,))
    x = torch.randn(3, 4, 11, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


def in_onnxruntime(module: nn.Module, example: Tensor, dynamic: tuple[int, ...]) -> Callable:
    """Export with these axes dynamic; the file as a function."""
    shapes = (dict.fromkeys(dynamic, Dim.DYNAMIC),)
    program = torch.onnx.export(
        module, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert {node.domain for node in program.model.graph} == {""}, "plain ONNX operators only"
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (argument.name for argument in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


LAYERS: dict[int, tuple[nn.Module, list[tuple[int, ...]]]] = {
    1: (
        NeighborhoodAttention1D(8, 2, 4, stride=3, is_causal=True, rel_pos_bias=True),
        [(9,), (4,), (14,)],
    ),
    2: (
        NeighborhoodAttention2D(8, 2, (3, 4), dilation=(2, 1), rel_pos_bias=True),
        [(7, 8), (6, 4), (11, 5)],
    ),
    # A window that depends on the map.
    3: (
        NeighborhoodAttention3D(
            8, 2, (2, 3, 3), is_causal=(True, False, False), small_maps="shrink"
        ),
        [(4, 5, 6), (2, 3, 2), (1, 7, 4)],
    ),
}


# Those of more axes take ten seconds and more each.
@pytest.mark.parametrize("rank", [1, *(pytest.param(r, marks=pytest.mark.slow) for r in (2, 3))])
def test_onnx_layers_with_dynamic_batch_and_map(rank: int) -> None:
    layer, sizes = LAYERS[rank]
    run = in_onnxruntime(layer.eval(), torch.randn(2, *sizes[0], 8), tuple(range(1 + rank)))
    for batch, size in enumerate(sizes, 1):
        x = torch.randn(batch, *size, 8)
        torch.testing.assert_close(run(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_onnx_model_with_dynamic_batch() -> None:
    model = create_model("medvitv2_tiny", num_classes=3).eval()
    run = in_onnxruntime(model, torch.randn(2, 3, 64, 64), (0,))
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(run(x), model(x), atol=1e-3, rtol=1e-3)


# ---- autocast and meta -------------------------------------------------------------------------
@pytest.mark.parametrize("backend", PORTABLE)
def test_autocast(backend: str | None) -> None:
    query, key, value = (t.requires_grad_() for t in _tensors(1, 8, 6, 2, 8))
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        # Mixed dtypes are what a norm before the attention leaves under autocast.
        out, lse = na2d(query, key.bfloat16(), value, 3, rpb=rpb, return_lse=True, backend=backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    (out.float().sum() + lse.sum()).backward()
    assert all(t.grad.dtype == torch.float32 for t in (query, key, value, rpb))
    half = [t.bfloat16() for t in (query, key, value)]
    torch.testing.assert_close(out, na2d(*half, 3, rpb=rpb, backend=backend))
    # The bias has a dtype of its own without autocast, too.
    (grad,) = torch.autograd.grad(na2d(*half, 3, rpb=rpb, backend=backend).float().sum(), rpb)
    assert grad.dtype == torch.float32
    true = na2d(*(t.double() for t in half), 3, rpb=rpb.double(), backend="reference")
    torch.testing.assert_close(out.double(), true, rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone() -> None:
    tensors = _tensors(1, 8, 2, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = na1d(*tensors, 3)
    assert out.equal(na1d(*tensors, 3))


@pytest.mark.parametrize("backend", PORTABLE)
def test_meta(backend: str | None) -> None:
    query, value = (torch.empty(2, 8, 6, 3, dim, device="meta") for dim in (4, 5))
    out, lse = na2d(query, query, value, 3, return_lse=True, backend=backend)
    assert out.is_meta and out.shape == (2, 8, 6, 3, 5)
    assert lse.is_meta and lse.shape == (2, 8, 6, 3)
