"""Every backbone under mmdet and mmseg, see :mod:`backbones.openmmlab.adapter`.

In a config: ``custom_imports = dict(imports=["backbones.openmmlab"])``.
"""

from __future__ import annotations

from backbones.openmmlab.adapter import (
    CPUAmpOptimWrapper,
    LayerDecayConstructor,
    TransposedFPN,
    VisionBackbone,
    allow_mmengine_checkpoints,
    check_channels,
    without_sync_norm,
)

__all__ = [
    "CPUAmpOptimWrapper",
    "LayerDecayConstructor",
    "TransposedFPN",
    "VisionBackbone",
    "allow_mmengine_checkpoints",
    "check_channels",
    "without_sync_norm",
]
