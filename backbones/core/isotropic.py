"""Networks of one resolution: the shell of plain vision transformers on timm's model protocol.

All blocks work on maps of one width and one stride, 16 as a rule. They stand in four groups, which
are the stages; what :attr:`feature_info` counts are the blocks, as with timm's vision transformers,
so that ``out_indices=(2, 5, 8, 11)`` means of a network of twelve what it means there. Where a
pyramid is wanted, it is made of the last map, see :class:`ops.pyramid.SimplePyramid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from backbones.core.base import StagedBackbone, check_format
from ops.arguments import require_tensor
from ops.position import resize_position_table
from ops.pyramid import SimplePyramid

__all__ = ["IsotropicBackbone"]


class IsotropicBackbone(StagedBackbone):
    """Stem → blocks of one width and stride, in groups → norm → head.

    Subclasses set ``stem``, ``stages`` (of :class:`IsotropicStage`, without downsampling or norms),
    ``norm`` and ``head``, then call :meth:`describe_blocks`. A table of positions belongs to the
    stem, as :class:`ops.position.PositionTable`; checkpoints made for another size of image have
    theirs interpolated.

    The keyword ``pyramid`` makes the features maps at a quarter, a half, once and twice the stride
    (4, 8, 16 and 32), in place of one a block; their layers have no published weights.
    """

    def describe_blocks(self, dim: int, *, stride: int = 16, pyramid: bool = False) -> None:
        """State what the maps look like; call it once all submodules are there.

        Args:
            dim: channels of all blocks.
            stride: of all maps relative to the image, a multiple of 4.
            pyramid: show a pyramid made of the last map, not the maps of blocks.
        """
        places = [
            (i, j)
            for i, stage in enumerate(self.stages)
            for j in range(len(stage.blocks))  # type: ignore[arg-type]
        ]
        self._places = tuple(places)  # stage and number in it of each block
        self.describe_features([dim] * len(self.stages), [stride] * len(self.stages))
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}.blocks.{j}"}
            for i, j in places
        ]
        self.pyramid: SimplePyramid | None = None
        if pyramid:
            self.pyramid = SimplePyramid(dim)
            self.feature_info = [
                {"num_chs": width, "reduction": round(stride / scale), "module": f"pyramid.{i}"}
                for i, (width, scale) in enumerate(
                    zip(self.pyramid.channels, self.pyramid.scales, strict=True)
                )
            ]

    def block_name(self, number: int) -> str:
        """Path of a block by its number in the whole network, which checkpoints use.

        Raises:
            IndexError: there is no such block.
        """
        i, j = self._places[number]
        return f"stages.{i}.blocks.{j}"

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Fits the first convolution and tables of positions."""
        if name.endswith("pos_embed") and tensor.ndim == 3 and tensor.shape[2] == shape[2]:
            sides = [round(n**0.5) for n in (tensor.shape[1], shape[1])]
            if [side**2 for side in sides] == [tensor.shape[1], shape[1]]:
                return resize_position_table(tensor, (sides[1], sides[1]))
        return super().resize_tensor(name, tensor, shape)

    # -- features --------------------------------------------------------------------------------

    def count_features(self) -> int:
        """How many feature maps there are: blocks, or levels of the pyramid."""
        if self.pyramid is not None:
            return len(self.pyramid)
        return sum(len(stage.blocks) for stage in self.stages)  # type: ignore[arg-type, misc]

    def stage_features(self) -> list[int]:
        """Which entry of ``feature_info`` is the map that each stage ends with.

        Raises:
            ValueError: the features are a pyramid.
        """
        if self.pyramid is not None:
            raise ValueError("with pyramid=True the features are not the maps of stages")
        ends = accumulate(len(stage.blocks) for stage in self.stages)  # type: ignore[arg-type]
        return [end - 1 for end in ends]

    def default_features(self) -> list[int]:
        """What ``features_only`` returns without ``out_indices``: four maps, one a stage."""
        return self.stage_features() if self.pyramid is None else super().default_features()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of chosen blocks, and the last one normalised.

        Args:
            x: (B, in_chans, H, W).
            indices: which of ``feature_info``: the last n (int), all (None) or those listed;
                negative ones count from the end.
            norm: apply the final norm to all maps that are returned, or to that of which the
                pyramid is made.
            stop_early: leave out the blocks after the last one asked for; the first value
                returned is then that block's map.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return the list alone.

        Raises:
            TypeError: ``x`` that is no tensor, indices that are no whole numbers.
            ValueError: an index that is not there, or an unknown format.
        """
        require_tensor("x", x)
        check_format(output_fmt)
        taken = self._take_indices(indices)
        x = self.stem(x)
        if self.pyramid is not None:
            x = self.stages(x)
            last = self.norm(x)
            maps = self.pyramid(last if norm else x, taken)
        else:
            whole = not (stop_early or intermediates_only) or taken[-1] + 1 == len(self._places)
            x, maps = self._run_until(x, taken, self.count_features() if whole else taken[-1] + 1)
            last = self.norm(x) if whole else x
            if norm:
                maps = [self.norm(m) for m in maps]
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (last, maps)

    def _run_until(self, x: Tensor, taken: Sequence[int], end: int) -> tuple[Tensor, list[Tensor]]:
        """What comes out of the first ``end`` blocks, and the maps behind those that are taken."""
        maps = []
        before = 0  # blocks of the stages that are done
        for stage in self.stages:
            if before >= end:
                break
            count = len(stage.blocks)  # type: ignore[arg-type]
            wanted = {i - before + 1 for i in taken if before <= i < before + count}
            first = 0
            for stop in sorted(wanted | {min(count, end - before)}):
                x = stage(x, first, stop)
                first = stop
                if stop in wanted:
                    maps.append(x)
            before += count
        return x, maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the chosen maps do not need; returns their absolute indices."""
        taken = self._take_indices(indices)
        if self.pyramid is not None:
            unused = [i for i in range(len(self.pyramid)) if i not in taken]
            for i in unused:
                self.pyramid[i] = nn.Identity()
            self.pruned_parts = tuple(f"pyramid.{i}." for i in unused)
            cut = False
        else:
            kept, lost = self._places[: taken[-1] + 1], self._places[taken[-1] + 1 :]
            self.pruned_parts = tuple(f"stages.{i}.blocks.{j}." for i, j in lost)
            self.stages = nn.Sequential(*list(self.stages)[: kept[-1][0] + 1])
            stage: Any = self.stages[-1]
            stage.blocks = stage.blocks[: kept[-1][1] + 1]
            cut = bool(lost)
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken
