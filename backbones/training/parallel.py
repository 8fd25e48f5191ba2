"""Replicated (DDP) and sharded (FSDP2) networks, and their full state.

FSDP2 is ``torch.distributed.fsdp.fully_shard``: every process keeps a shard of each weight, its
gradient and its optimizer state, and gathers a block's weights when that block runs. Checkpoints
contain full tensors, so they don't depend on the number of processes.
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
from torch.utils._pytree import tree_map_only

from backbones.common.errors import RecipeError
from backbones.common.processes import World
from backbones.core.base import StagedBackbone

_LARGEST = 1e12


def replicate(network: nn.Module, world: World) -> nn.Module:
    """The network, wrapped in DDP if there are several processes."""
    if world.size == 1:
        return network
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids)


def shard(network: nn.Module, world: World) -> nn.Module:
    """Shard the weights block by block; modifies ``network`` in place and returns it."""
    if not dist.is_initialized():
        raise RecipeError("fsdp needs torchrun: torchrun --nproc-per-node N train_cls.py …")
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Token blocks return a view, which is a problem only for in-place ops after them. There are
    # none, and tests/training/test_parallel.py compares every family's gradients.
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
    """Inside, processes synchronise gradients only for the ``last`` batch of an update."""
    if isinstance(net, DistributedDataParallel) and not last:
        return net.no_sync()
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(last)
    return nullcontext()


def is_bounded(network: nn.Module, world: World) -> bool:
    """Whether all weights and running statistics are within ±10¹²; a collective call.

    A norm can hide that the preceding weights grow without bound while the loss stays finite.
    """
    tensors: list[Tensor] = list(network.parameters())
    tensors += [
        b for n, b in network.named_buffers() if n.endswith(("running_mean", "running_var"))
    ]
    shards = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    bounded = [(shard.detach().abs() <= _LARGEST).all() for shard in shards]  # NaN is not
    return not bool(world.max((~torch.stack(bounded).all()).float()))


def full_state(state: Any) -> Any:
    """A nested state with sharded tensors gathered to full ones; a collective call."""
    return tree_map_only(DTensor, lambda sharded: sharded.full_tensor().cpu(), state)


def load_state(part: Any, state: dict[str, Any]) -> None:
    """Load a state of full tensors into a possibly sharded module, optimizer or scheduler."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        state = {name: _local_shard(value, own.get(name)) for name, value in state.items()}
    elif isinstance(part, torch.optim.Optimizer):
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        parameters = [p for group in part.param_groups for p in group["params"]]
        owners = dict(zip(numbers, parameters, strict=False))
        shards = {
            number: {key: _local_shard(value, owners.get(number)) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        state = {**state, "state": shards}
    part.load_state_dict(state)


def _local_shard(value: Any, owner: Any) -> Any:
    """This process's shard of ``value``, if ``owner`` is sharded."""
    if not (isinstance(owner, DTensor) and isinstance(value, Tensor)):
        return value
    if value.shape != owner.shape:  # a step counter, or a mismatch that loading reports
        return value
    mesh = owner.device_mesh
    # Every process has read the same file: nothing needs to be sent.
    value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, owner.placements, src_data_rank=None)
