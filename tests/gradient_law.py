"""The gradient of an image alone is its gradient within a batch: what the tests of it share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import training_runs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from zoo import FAMILIES, RESTORATION, images, randomise, small

from backbones.training.distributed import leave_processes

Gradients = dict[str, Tensor]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Those whose outputs for an image do not depend on the others of its batch, in train mode either.
NO_BATCH_STATISTICS = ("dinat_s", "favit", "hat", "nat", "nat_isotropic", "vig", "vrwkv")
PRECISIONS = ("float32", "bfloat16", "autocast")


class Case(NamedTuple):
    """A model and how it is trained.

    ``mode`` is eval, frozen (train mode, but for the norms) or train, ``memory_format`` one of
    FORMATS, ``precision`` one of PRECISIONS or float64.
    """

    family: str
    mode: str = "eval"
    memory_format: str = "contiguous"
    precision: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and images."""
        return getattr(torch, self.precision.replace("autocast", "float32"))

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, if that is the case."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "autocast")


def cases(families: list[str], precisions: tuple[str, ...]) -> Iterator[Case]:
    """Every family in every mode that it has, in both memory formats."""
    for family, mode, memory_format, precision in itertools.product(
        families, ("eval", "frozen", "train"), FORMATS, precisions
    ):
        if mode != "train" or family in NO_BATCH_STATISTICS:
            yield Case(family, mode, memory_format, precision)


class Objective(nn.Module):
    """A sum over images, with all that a user may put behind a backbone.

    The classifier's logits; and the maps as tokens, layer-normed: that sends gradients back whose
    strides torch's batch norm misreads. For restoration the absolute error.
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
    """Running statistics instead of the batch's."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def pictures(case: Case, count: int = 2) -> Tensor:
    """So small that some maps have one row, and others more."""
    size = (16, 24) if case.family in RESTORATION else (64, 96)
    x = images(count, 3, *size).to(case.dtype)
    return x.contiguous(memory_format=FORMATS[case.memory_format])


def gradients(objective: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> Gradients:
    """Of the images (``"images"``) and of the parameters that take part."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x = x.detach().clone().requires_grad_()
    found = torch.autograd.grad(objective(x), [x, *named.values()], allow_unused=True)
    both = zip(["images", *named], found, strict=True)
    return {name: gradient for name, gradient in both if gradient is not None}


def alone(objective: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> Gradients:
    """What the images give one by one: their gradients in a row, and the parameters' sums."""
    each = [gradients(objective, image, model) for image in x.split(1)]
    return {
        name: torch.cat([one[name] for one in each])
        if name == "images"
        else torch.stack([one[name].double() for one in each]).sum(0)
        for name in each[0]
    }


def assert_same(found: Gradients, wanted: Gradients, case: Case, model: nn.Module) -> None:
    """Up to rounding, each tensor; a tiny one is measured by what is typical in the model."""
    exact = case.precision in ("float32", "float64")
    if not exact:
        # torch adds up the gradients of layer norm's parameters in bfloat16 itself.
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


def start_one_of_two(
    *arguments: Any, before: None = None, env: dict[str, str] | None = None
) -> training_runs.Run:
    """A process that trains with another, see :func:`shared_gradients`."""
    process = training_runs.Run(target=_share, args=(*arguments, env or {}))
    process.start()
    return process


def shared_gradients(wanted: list[Case], folder: Path) -> list[Gradients]:
    """What two processes of DDP, each with one image, have after the backward pass."""
    launched = training_runs.start_two(wanted, folder, launch=start_one_of_two)
    assert training_runs.join(launched) == [0, 0]
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        first["images"] = torch.cat([first["images"], second["images"]])
    return ranks[0]


def _share(wanted: list[Case], folder: Path, env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = []
    for case in wanted:
        objective = Objective(case)
        # Some families carry parameters of the original that it never used.
        net = DistributedDataParallel(objective, find_unused_parameters=True)
        x = pictures(case)[rank : rank + 1].clone().requires_grad_()
        with case.autocast():
            net(x).backward()
        # DDP takes the mean over the processes.
        named = {n: p.grad * 2 for n, p in objective.named_parameters() if p.grad is not None}
        found.append({**named, "images": x.grad})
    torch.save(found, folder / f"{rank}.pt")
    leave_processes()
    os._exit(0)


def quick_cases() -> list[Case]:
    """One a family in float32, in either memory format."""
    return [case for case in cases(FAMILIES, ("float32",)) if case.mode != "frozen"]
