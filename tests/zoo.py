"""The models that represent their family in the quick tests: shallow, with randomised values."""

from __future__ import annotations

import functools
import io
import pickle
from typing import Any

import torch
from torch import nn

import backbones
from backbones.core.outlines import outlines as outlines

# The smallest variant of each family, and arguments that make it shallow and narrow.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "biformer": ("biformer_tiny", {"dims": (64, 96, 128, 192), "depths": (1, 1, 2, 1)}),
    "dinat_s": (
        "dinat_s_tiny",
        {"dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "depths": (1, 2, 2, 1)},
    ),
    "ecanet": (
        "eca_resnet50",
        {"dims": (64, 96, 128, 192), "depths": (1, 1, 2, 1), "stem_dim": 16},
    ),
    "efficientvit": (
        "efficientvit_m0",
        {"dims": (32, 64, 96), "num_heads": (2, 2, 3), "depths": (1, 1, 1)},
    ),
    "favit": (
        "favit_b0",
        {"dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)},
    ),
    "hat": (
        "hat_s_x2",
        {
            "dim": 24,
            "depths": (2, 1),
            "num_heads": (2, 2),
            "window_size": 8,
            "compress_ratio": 3,
            "squeeze_factor": 8,
        },
    ),
    "inception_next": ("inception_next_atto", {"dims": (40, 56, 64, 96), "depths": (1, 1, 2, 1)}),
    "litv2": (
        "litv2_s_alpha_0_5",
        {"dims": (32, 48, 64, 96), "num_heads": (0, 0, 4, 6), "depths": (1, 1, 2, 1)},
    ),
    "medvitv2": ("medvitv2_tiny", {"dims": (64, 128, 128, 160), "depths": (1, 2, 3, 1)}),
    "nat": (
        "nat_mini",
        {
            "dims": (64, 96, 128, 192),
            "num_heads": (2, 3, 4, 6),
            "depths": (2, 1, 2, 1),
            "dilations": ((1, 2), 1, (1, 2), 1),
            "layer_scale": 0.5,
        },
    ),
    "nat_isotropic": (
        "dinat_isotropic_small",
        {"dim": 64, "num_heads": 2, "depths": (1, 1, 1, 1), "kernel_size": 3},
    ),
    "overlock": (
        "overlock_xt",
        {
            **{"dims": (32, 48, 64, 96), "depths": (1, 1, 1, 1), "focus_depths": (2, 1)},
            "num_heads": (2, 3),
        },
    ),
    "proxylessnas": (
        "proxyless_cpu",
        {
            "dims": ((24,), (32, 32), (48,), (88, 88, 104), (216,)),
            "kernel_sizes": ((3,), (5, 3), (3,), (7, 0, 5), (5,)),
            "expansions": ((1,), (3, 3), (3,), (6, 0, 3), (3,)),
        },
    ),
    "ravlt": (
        "ravlt_t",
        {"dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)},
    ),
    "shvit": ("shvit_s1", {"dims": (64, 96, 128), "attn_dims": (0, 24, 36), "depths": (1, 1, 1)}),
    "unireplknet": ("unireplknet_a", {"dims": (40, 80, 112, 160), "depths": (1, 1, 2, 1)}),
    "van": ("van_b0", {"dims": (32, 48, 64, 96), "depths": (1, 1, 2, 1)}),
    "vig": (
        "vig_h_t",
        {"dims": (64, 96, 128, 192), "num_heads": (2, 3, 4, 6), "depths": (1, 1, 2, 1)},
    ),
    "vmamba": ("vmamba_tiny_s1l8", {"dims": (48, 64, 96, 128), "depths": (1, 1, 2, 1)}),
    "vrwkv": ("vrwkv_t", {"dim": 64, "depths": (1, 1, 1, 1)}),
}
FAMILIES = sorted(SMALL)
# Image-to-image models, without classifier and pyramid.
RESTORATION = {"hat"}
CLASSIFIERS = [family for family in FAMILIES if family not in RESTORATION]
# Families whose first stage has stride 16, and which can expose their stem.
STRIDE_16 = [family for family in FAMILIES if family in ("efficientvit", "shvit")]
# Families that drop the last rows of an image whose side is no multiple of a stride.
ROUNDED_DOWN = {"inception_next"}
# Families with stride 16 throughout, which build a pyramid from their last map.
ISOTROPIC = [family for family in FAMILIES if family in ("nat_isotropic", "vrwkv")]


def small(family: str, **kwargs: Any) -> Any:
    """A shallow model of the family, the same on every call."""
    is_plain = all(isinstance(value, int | float) for value in kwargs.values())
    if not is_plain or not torch.empty(0).is_cpu:
        return _initialised(family, **kwargs)
    # A copy is quicker than the initialisation.
    mould, random_state = _prototype(family, **kwargs)
    torch.manual_seed(0)
    torch.set_rng_state(random_state)
    return mould.copy()


@functools.lru_cache(maxsize=2 * len(FAMILIES), typed=True)
def _prototype(family: str, **kwargs: float) -> tuple[Mould, torch.Tensor]:
    """The model, and the state of the random numbers after its initialisation."""
    with torch.inference_mode(False):  # whatever the first test that wants it
        return Mould(_initialised(family, **kwargs)), torch.get_rng_state()


class Mould:
    """Copies a model several times as fast as deepcopy: pickled, with its tensors kept apart."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: list[torch.Tensor] = []
        numbers: dict[int, int] = {}

        class Pickler(pickle.Pickler):
            def persistent_id(_, value: Any) -> int | None:
                if not isinstance(value, torch.Tensor):
                    return None
                if id(value) not in numbers:
                    numbers[id(value)] = len(self._tensors)
                    self._tensors.append(value)
                return numbers[id(value)]

        stream = io.BytesIO()
        Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(model)
        self._pickled = stream.getvalue()

    def copy(self) -> Any:
        tensors = [_cloned(tensor) for tensor in self._tensors]

        class Unpickler(pickle.Unpickler):
            def persistent_load(_, number: int) -> torch.Tensor:
                return tensors[number]

        return Unpickler(io.BytesIO(self._pickled)).load()


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    clone = tensor.detach().clone()
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


def _initialised(family: str, **kwargs: Any) -> Any:
    name, arguments = SMALL[family]
    torch.manual_seed(0)
    return backbones.create_model(name, **{**arguments, **kwargs})


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Randomise norms, scales and zero-initialised tensors, so that no branch is hidden."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-2:
            parameter.normal_(0, 0.2, generator=generator)
    return model


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal images (B, C, H, W)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
