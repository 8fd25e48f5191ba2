"""Stages of backbones.

A family whose blocks need another layout or shared tables defines its own stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops.reparam import fuse_children

layer_norm = partial(LayerNorm2d, eps=1e-5)  # PyTorch's eps, unlike timm's


class Stage(nn.Module):
    """One resolution of a backbone: downsample, blocks, norm. Input and output are NCHW.

    A family whose blocks need another layout or shared tables overrides :meth:`forward` and passes
    them to :meth:`run_blocks`. If the next stage needs more than the map, :meth:`forward` returns a
    tuple that begins with the map; the next stage receives all of it.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm if norm is not None else nn.Identity()
        self.grad_checkpointing = False
        self.fused = False

    def run_blocks(
        self, x: Tensor, *shared: Any, first: int = 0, stop: int | None = None
    ) -> Tensor:
        """Run the blocks ``first`` … ``stop`` − 1 (default: all), each with ``(x, *shared)``.

        With gradient checkpointing, they are recomputed in the backward pass.
        """
        for block in islice(self.blocks, first, stop):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *shared, use_reentrant=False)
            else:
                x = block(x, *shared)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run_blocks(self.downsample(x)))

    def fuse(self) -> Stage:
        """Fold layers in place."""
        if not self.fused:
            fuse_children(self)
            self.fused = True
        return self


def map_of(output: Any) -> Tensor:
    """The map (B, C, H, W) in the output of a stage."""
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


def with_map(output: Any, features: Tensor) -> Any:
    """The output of a stage with another map."""
    return (features, *output[1:]) if isinstance(output, tuple) else features


class TokenStage(Stage):
    """A stage whose blocks map (B, h, w, dim) to (B, h, w, dim); downsample and norm use NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.norm(self.run_blocks(x).permute(0, 3, 1, 2))


class IsotropicStage(Stage):
    """A group of blocks of a single-resolution network, which map (B, h, w, dim) to (B, h, w, dim).

    A family whose blocks need another layout or shared tables overrides :meth:`forward`.
    """

    def forward(self, x: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
        """Run the blocks ``first`` … ``stop`` − 1 (default: all) on a map (B, dim, h, w)."""
        x = self.run_blocks(x.permute(0, 2, 3, 1), first=first, stop=stop)
        return x.permute(0, 3, 1, 2)


def make_stages(
    depths: Sequence[int],
    drop_path_rate: float,
    block: Callable[[int, int, float], nn.Module],
    downsample: Callable[[int], nn.Module] | None = None,
    stage_type: Callable[..., Stage] = Stage,
    **parts: Callable[[int], Any],
) -> nn.Sequential:
    """The stages of a backbone, and their parts in the order of the arguments.

    Args:
        depths: blocks of each stage.
        drop_path_rate: stochastic depth of the last block, increasing linearly from 0.
        block: makes a block from the index of its stage, its own in the stage, and its stochastic
            depth.
        downsample: makes the first layer of each stage except the first, from the stage's index.
        stage_type: the class of the stages.
        **parts: make further arguments of that class, such as ``norm``.
    """
    rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
    return nn.Sequential(
        *(
            stage_type(
                [block(i, j, next(rates)) for j in range(depth)],
                downsample=downsample(i) if downsample and i else None,
                **{name: make(i) for name, make in parts.items()},
            )
            for i, depth in enumerate(depths)
        )
    )


def channels_before(stem_dim: int, dims: Sequence[Sequence[int]], stage: int, block: int) -> int:
    """Input channels of a block, where ``dims`` are the output channels of each, by stage."""
    return [stem_dim, *chain(*dims[:stage]), *dims[stage][:block]][-1]
