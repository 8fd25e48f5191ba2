"""Helpers for testing that an image's gradient alone equals its gradient within a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import ISOTROPIC, RESTORATION, STRIDE_16, images, randomise, small

Gradients = dict[str, Tensor]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Families whose output for an image is independent of the rest of the batch even in train mode.
NO_BATCH_STATISTICS = ("dinat_s", "favit", "hat", "nat", "nat_isotropic", "vig", "vmamba", "vrwkv")
# Families with larger images, for stride 64, many tokens or dilated neighbourhoods.
_WIDE = {*STRIDE_16, *ISOTROPIC, "dinat_s", "medvitv2", "nat"}
PRECISIONS = ("float32", "bfloat16", "autocast")


class Case(NamedTuple):
    """A model and how it is trained.

    ``mode`` is eval, frozen (train mode except for norms) or train; ``memory_format`` is one of
    FORMATS; ``precision`` is one of PRECISIONS or float64.
    """

    family: str
    mode: str = "eval"
    memory_format: str = "contiguous"
    precision: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and images."""
        return getattr(torch, self.precision.replace("autocast", "float32"))

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for mixed precision, if the case uses it."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "autocast")


def cases(families: list[str], precisions: tuple[str, ...]) -> Iterator[Case]:
    """Every family in each of its modes and in both memory formats."""
    for family, mode, memory_format, precision in itertools.product(
        families, ("eval", "frozen", "train"), FORMATS, precisions
    ):
        if mode != "train" or family in NO_BATCH_STATISTICS:
            yield Case(family, mode, memory_format, precision)


class Objective(nn.Module):
    """A sum over images of whatever a user may compute from a backbone.

    It uses the classifier's logits and the layer-normed maps as tokens, whose gradients have
    strides that torch's batch norm handles incorrectly. For restoration, it is the absolute error.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.restores = case.family in RESTORATION
        self.model = randomise(small(case.family, drop_path_rate=0.0)).to(case.dtype)
        self.model.to(memory_format=FORMATS[case.memory_format])
        self.train(case.mode != "eval")
        if case.mode == "frozen":
            freeze_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.restores:
            out = self.model(x)
            return (out - _weights(out, 0)).abs().sum()
        last, maps = self.model.forward_intermediates(x)
        logits = self.model.forward_head(last)
        outs = list(logits) if isinstance(logits, tuple) else [logits]
        for feature in (last, *maps):
            tokens = feature.flatten(2).transpose(1, 2)  # (B, h·w, C)
            outs.append(F.layer_norm(tokens, tokens.shape[2:]))
        return sum((out * _weights(out, i)).sum() for i, out in enumerate(outs))


def _weights(out: Tensor, seed: int) -> Tensor:
    return images(1, *out.shape[1:], seed=seed + 10).to(out.dtype)


def freeze_norms(model: nn.Module) -> None:
    """Use running statistics instead of the batch's."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def pictures(case: Case, count: int = 2) -> Tensor:
    """Images so small that pyramids end in maps with a single row, but for :data:`_WIDE`."""
    size = (64, 96) if case.family in _WIDE else (32, 64)
    size = (16, 24) if case.family in RESTORATION else size
    x = images(count, 3, *size).to(case.dtype)
    return x.contiguous(memory_format=FORMATS[case.memory_format])


def gradients(objective: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> Gradients:
    """Gradients of the images (``"images"``) and of the parameters that are used."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x = x.detach().clone().requires_grad_()
    found = torch.autograd.grad(objective(x), [x, *named.values()], allow_unused=True)
    both = zip(["images", *named], found, strict=True)
    return {name: gradient for name, gradient in both if gradient is not None}


def alone(objective: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> Gradients:
    """Gradients from one image at a time: concatenated for images, summed for parameters."""
    each = [gradients(objective, image, model) for image in x.split(1)]
    return {
        name: torch.cat([one[name] for one in each])
        if name == "images"
        else torch.stack([one[name].double() for one in each]).sum(0)
        for name in each[0]
    }


def assert_same(found: Gradients, wanted: Gradients, case: Case, model: nn.Module) -> None:
    """Check that gradients agree up to rounding; tiny ones relative to the model's median norm."""
    exact = case.precision in ("float32", "float64")
    if not exact:
        # torch itself accumulates the gradients of layer norm's parameters in bfloat16.
        rough = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(module, nn.LayerNorm)
            for parameter in ("weight", "bias")
        }
        wanted = {name: gradient for name, gradient in wanted.items() if name not in rough}
    sizes = {name: gradient.double().norm() for name, gradient in wanted.items()}
    typical = torch.stack(list(sizes.values())).median()
    least, most = (1e-2, 1e-4) if exact else (0.1, 0.05)
    for name, gradient in wanted.items():
        error = (found[name].double() - gradient.double()).norm()
        assert error <= most * max(sizes[name], least * typical), (name, error / sizes[name])
