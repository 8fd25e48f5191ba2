"""NAT and DiNAT with the kernels they were published with: a contender for ``benchmark.py``.

The networks are ours, with neighborhood attention layers from NATTEN 0.17.3, the last release but
one whose layers support the relative position bias. It needs an older torch and a compiler.
Without options, its kernels are compiled without optimisation:

    pip install cmake ninja
    CXXFLAGS="-O3 -march=native" pip install --no-build-isolation natten==0.17.3
    python tools/benchmark.py --models nat_mini dinat_mini --modes eager fused \
        --against tools/natten_0_17.py --output runs/natten
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import backbones
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import MapAttention

__all__ = ["create_model"]


def create_model(name: str) -> nn.Module | None:
    """Our network of that name with NATTEN's layers; None if it has no neighborhood attention.

    Raises:
        ImportError: NATTEN is not installed or is too new.
    """
    model = backbones.create_model(name)
    ours = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, NeighborhoodAttention2D) and not isinstance(layer, MapAttention)
    ]
    if not ours:
        return None
    theirs = _layer_class()
    for path, layer in ours:
        model.set_submodule(path, _converted(layer, theirs))
    return model


def _layer_class() -> Any:
    # NATTEN imports this name, which newer versions of torch have moved.
    if not hasattr(torch.cuda, "_device_t"):
        torch.cuda._device_t = torch.types.Device  # type: ignore[attr-defined]
    import natten

    if not natten.__version__.startswith("0.17."):
        raise ImportError(f"NATTEN 0.17 is wanted, {natten.__version__} is installed")
    return natten.NeighborhoodAttention2D


def _converted(layer: NeighborhoodAttention2D, theirs: Any) -> nn.Module:
    converted: nn.Module = theirs(
        layer.embed_dim,
        layer.num_heads,
        layer.kernel_size,
        dilation=layer.dilation,
        rel_pos_bias=layer.rpb is not None,
        qkv_bias=layer.qkv.bias is not None,
        qk_scale=layer.scale,
    )
    converted.load_state_dict(layer.state_dict())
    return converted.train(layer.training)
