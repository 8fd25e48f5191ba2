"""Published vision models behind timm's API; start with ``backbones.create_model``."""

from __future__ import annotations

from backbones.core.requirements import explanation as _explanation

try:
    import timm as _timm  # noqa: F401  (with torch and torchvision)
except (ImportError, RuntimeError) as error:
    raise ImportError(
        _explanation(error)
        or f"torch, torchvision and timm are incompatible: {error}. Install a compatible set with "
        "`pip install --force-reinstall torch torchvision timm`."
    ) from error

import ops as _ops

if not hasattr(_ops, "OPS_OF_VISION_BACKBONES"):
    raise ImportError(
        f"`backbones` needs its own package `ops`, but `import ops` finds {_ops.__file__}. "
        "Uninstall that package, or put the folder of vision-backbones first in sys.path."
    )

try:
    from backbones.core.base import StagedBackbone
    from backbones.core.checkpoint import CheckpointError, LoadReport, load_checkpoint
    from backbones.core.isotropic import IsotropicBackbone
    from backbones.core.registry import create_model, empty_cache, fuse, list_families, list_models
    from backbones.core.stage import IsotropicStage, Stage
    from backbones.core.vit_adapter import ViTAdapter
    from backbones.fusing.explain import Explanation, explain

    # Importing a family registers its models, here and with timm, and its inference forms.
    from backbones import (  # noqa: F401  # isort: skip
        biformer,
        dinat_s,
        ecanet,
        efficientvit,
        favit,
        hat,
        inception_next,
        litv2,
        medvitv2,
        nat,
        nat_isotropic,
        overlock,
        proxylessnas,
        ravlt,
        shvit,
        unireplknet,
        van,
        vig,
        vmamba,
        vrwkv,
    )
except ImportError as error:
    if (_reason := _explanation(error)) is None:
        raise
    raise ImportError(_reason) from error

__version__ = "0.2.0.dev0"

__all__ = [
    "CheckpointError",
    "Explanation",
    "IsotropicBackbone",
    "IsotropicStage",
    "LoadReport",
    "Stage",
    "StagedBackbone",
    "ViTAdapter",
    "create_model",
    "empty_cache",
    "explain",
    "fuse",
    "list_families",
    "list_models",
    "load_checkpoint",
    *list_families(),
]
