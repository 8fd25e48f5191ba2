"""Copies (DDP) or shares (FSDP2) of a network on several processes, and its whole state again.

FSDP2 is ``torch.distributed.fsdp.fully_shard``: every process keeps a part of each weight, of its
gradient and of what the optimizer knows about it, and fetches a block's other parts when that
block runs. Checkpoints hold whole tensors all the same, so they do not depend on the processes.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from backbones.core.base import StagedBackbone
from backbones.training.distributed import World
from backbones.training.errors import RecipeError

__all__ = ["is_sound", "load_whole", "replicate", "shard", "synchronized_gradients", "whole"]


_LARGEST = 1e12


def replicate(network: nn.Module, world: World) -> nn.Module:
    """What the loop calls: the network, wrapped in DDP where there are several processes."""
    if world.size == 1:
        return network
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids)


def shard(network: nn.Module, world: World) -> nn.Module:
    """Share out the weights, block by block; changes ``network`` in place and returns it.

    Raises:
        RecipeError: torchrun did not start this process.
    """
    if not dist.is_initialized():
        raise RecipeError("fsdp needs torchrun: torchrun --nproc-per-node N train_cls.py …")
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Blocks that work on tokens return a view, which only an in-place op after them would spoil;
    # there is none, and tests/training/test_parallel.py compares every family's gradients.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor")
    for backbone in network.modules():
        if isinstance(backbone, StagedBackbone):
            for stage in backbone.stages:
                for block in stage.blocks:  # type: ignore[union-attr]
                    fully_shard(block, mesh=mesh)
                fully_shard(stage, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def synchronized_gradients(net: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Within it, processes exchange gradients only with the ``last`` batch of an update."""
    if isinstance(net, DistributedDataParallel) and not last:
        return net.no_sync()
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(last)
    return nullcontext()


def is_sound(network: nn.Module, world: World) -> bool:
    """Whether every weight and running statistic is a number within ±10¹²; all processes must ask.

    A norm hides for a while that the weights before it grow without end: the loss stays finite.
    """
    tensors: list[Tensor] = list(network.parameters())
    tensors += [
        b for n, b in network.named_buffers() if n.endswith(("running_mean", "running_var"))
    ]
    shares = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    sound = [(share.detach().abs() <= _LARGEST).all() for share in shares]  # NaN is not
    return not bool(world.max((~torch.stack(sound).all()).float()))


def whole(state: Any) -> Any:
    """A nested state with whole tensors for shared ones; every process must ask for it."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value) for value in state)
    return state


def load_whole(part: Any, state: dict[str, Any]) -> None:
    """Let a module, optimizer or scheduler load a state of whole tensors, its share of them."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        state = {name: _share(value, own.get(name)) for name, value in state.items()}
    elif isinstance(part, torch.optim.Optimizer):
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        parameters = [p for group in part.param_groups for p in group["params"]]
        owners = dict(zip(numbers, parameters, strict=False))
        shares = {
            number: {key: _share(value, owners.get(number)) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        state = {**state, "state": shares}
    part.load_state_dict(state)


def _share(value: Any, owner: Any) -> Any:
    """This process's share of ``value``, if it is as ``owner`` is."""
    if not (isinstance(owner, DTensor) and isinstance(value, Tensor)):
        return value
    if value.shape != owner.shape:  # a counter of steps, or a misfit that loading will name
        return value
    mesh = owner.device_mesh
    # Every process has read the same file: nothing needs to be sent.
    value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, owner.placements, src_data_rank=None)
