"""Every backbone under mmdet and mmseg, see :mod:`backbones.openmmlab.adapter`, and necks.

In a config: ``custom_imports = dict(imports=["backbones.openmmlab"])``.
"""

from __future__ import annotations

from backbones.openmmlab.adapter import (
    CPUAmpOptimWrapper,
    LayerDecayConstructor,
    VisionBackbone,
    allow_mmengine_checkpoints,
    check_channels,
    without_sync_norm,
)
from backbones.openmmlab.necks import SimpleFPN, TransposedFPN

__all__ = [
    "CPUAmpOptimWrapper",
    "LayerDecayConstructor",
    "SimpleFPN",
    "TransposedFPN",
    "VisionBackbone",
    "allow_mmengine_checkpoints",
    "check_channels",
    "without_sync_norm",
]
