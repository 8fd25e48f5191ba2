"""Neighborhood attention as an ONNX file gives in onnxruntime what it gives in torch."""

import io

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from backbones import create_model
from ops.neighborhood import (
    BACKENDS,
    NAParams,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

# What torch's exporter says of torch's own use of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def in_onnxruntime(module: nn.Module, example: Tensor, dynamic: tuple[int, ...]):
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


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (
            NeighborhoodAttention1D(8, 2, 4, stride=3, is_causal=True, rel_pos_bias=True),
            [(9,), (4,), (14,)],
        ),
        # Ten seconds and more each.
        pytest.param(
            NeighborhoodAttention2D(8, 2, (3, 4), dilation=(2, 1), rel_pos_bias=True),
            [(7, 8), (6, 4), (11, 5)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            NeighborhoodAttention3D(8, 2, (2, 3, 3), is_causal=(True, False, False)),
            [(4, 5, 6), (2, 3, 3), (3, 7, 4)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["1d", "2d", "3d"],
)
def test_layers_with_dynamic_batch_and_map(layer: nn.Module, sizes: list[tuple[int, ...]]) -> None:
    layer.eval()
    axes = tuple(range(1 + len(sizes[0])))
    run = in_onnxruntime(layer, torch.randn(2, *sizes[0], 8), axes)
    for batch, size in enumerate(sizes, 1):
        x = torch.randn(batch, *size, 8)
        torch.testing.assert_close(run(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_window_that_depends_on_the_map() -> None:
    class Wide(nn.Module):
        """Dilated as far as the map allows."""

        def forward(self, query: Tensor) -> Tensor:
            dilation = tuple(torch.sym_min(5, n // 3) for n in query.shape[1:3])
            params = NAParams((3, 3), (1, 1), dilation, (False, False), 0.5)
            return BACKENDS["reference"].attend(*(query,) * 3, None, None, None, params)[0]

    run = in_onnxruntime(Wide().eval(), torch.randn(1, 8, 11, 2, 4), (1, 2))
    for size in ((8, 11), (9, 20), (12, 7)):
        query = torch.randn(1, *size, 2, 4)
        torch.testing.assert_close(run(query), Wide()(query), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_model_with_dynamic_batch() -> None:
    model = create_model("medvitv2_tiny", num_classes=3).eval()
    run = in_onnxruntime(model, torch.randn(2, 3, 64, 64), (0,))
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(run(x), model(x), atol=1e-3, rtol=1e-3)
