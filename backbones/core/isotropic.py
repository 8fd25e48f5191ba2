"""Single-resolution (isotropic) networks, like plain vision transformers, with timm's model API.

All blocks have the same width and stride, usually 16, and are divided into four groups, the stages.
:attr:`feature_info` lists blocks, as in timm's vision transformers, so that ``out_indices=(2, 5, 8,
11)`` has the same meaning there and here for twelve blocks. A pyramid, if requested, is derived
from the last map, see :class:`ops.pyramid.SimplePyramid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.published import children, renamed
from ops.position import resize_position_table
from ops.pyramid import SimplePyramid


class IsotropicBackbone(StagedBackbone):
    """Stem → groups of blocks of the same width and stride → norm → head.

    Subclasses set ``stem``, ``stages`` (of :class:`IsotropicStage`, without downsampling or norms),
    ``norm`` and ``head``, then call :meth:`describe_blocks`. Position embeddings belong to the
    stem, as :class:`ops.position.PositionTable`; those of checkpoints for another image size are
    interpolated.

    With the keyword ``pyramid``, the features are maps at 1/4, 1/2, 1 and 2 times the stride (4, 8,
    16 and 32) instead of one per block; the pyramid's layers have no published weights.
    """

    def describe_blocks(self, dim: int, *, stride: int = 16, pyramid: bool = False) -> None:
        """Declare the feature maps; call it after all submodules have been created.

        ``stride`` is that of all blocks relative to the image, a multiple of 4.
        """
        places = [
            (i, j)
            for i, stage in enumerate(self.stages)
            for j in range(len(stage.blocks))  # type: ignore[arg-type]
        ]
        self._places = tuple(places)  # (stage, index in it) of each block
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
        """Path of a block by its index in the whole network, as used in checkpoints."""
        i, j = self._places[number]
        return f"stages.{i}.blocks.{j}"

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Like the base's; blocks are numbered through all stages."""
        blocks = map(self.block_name, range(len(self._places)))
        places = children("^(?:blocks|layers)", *blocks)
        return super().convert_state_dict(
            {renamed(key, places): tensor for key, tensor in state_dict.items()}
        )

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Adapts the first convolution and position embeddings."""
        if name.endswith("pos_embed") and tensor.ndim == 3 and tensor.shape[2] == shape[2]:
            sides = [round(n**0.5) for n in (tensor.shape[1], shape[1])]
            if [side**2 for side in sides] == [tensor.shape[1], shape[1]]:
                return resize_position_table(tensor, (sides[1], sides[1]))
        return super().resize_tensor(name, tensor, shape)

    # -- running ---------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> Tensor:
        """The tokens before the first block, to which an adapter adds; default: the stem's."""
        return self.stem(x)

    def after_embed(self, x: Tensor) -> Tensor:
        """The rest of the stem after :meth:`embed`; by default, none."""
        return x

    # -- features --------------------------------------------------------------------------------

    def count_features(self) -> int:
        """The number of feature maps: blocks, or levels of the pyramid."""
        if self.pyramid is not None:
            return len(self.pyramid)
        return sum(len(stage.blocks) for stage in self.stages)  # type: ignore[arg-type, misc]

    def stage_features(self) -> list[int]:
        """The index in ``feature_info`` of each stage's output; not for a pyramid."""
        if self.pyramid is not None:
            raise ValueError("with pyramid=True the features are not the maps of stages")
        ends = accumulate(len(stage.blocks) for stage in self.stages)  # type: ignore[arg-type]
        return [end - 1 for end in ends]

    def default_features(self) -> list[int]:
        """The maps that ``features_only`` returns without ``out_indices``: one per stage."""
        return self.stage_features() if self.pyramid is None else super().default_features()

    def take_maps(
        self, x: Tensor, taken: Sequence[int], norm: bool, whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Like the base's, by blocks instead of stages.

        ``norm`` applies the final norm to all returned maps, or to the one that the pyramid is
        derived from.
        """
        x = self.stem(x)
        if self.pyramid is not None:
            x = self.stages(x)
            last = self.norm(x)
            return last, self.pyramid(last if norm else x, taken)
        whole = whole or taken[-1] + 1 == len(self._places)
        end, maps = self.count_features() if whole else taken[-1] + 1, []
        for number, (i, j) in enumerate(self._places[:end]):
            x = self.stages[i](x, j, j + 1)
            if number in taken:
                maps.append(self.norm(x) if norm else x)
        return (self.norm(x) if whole else x), maps

    def prune_stages(self, taken: Sequence[int]) -> bool:
        """Like the base's, for blocks or levels of the pyramid."""
        if self.pyramid is not None:
            unused = [i for i in range(len(self.pyramid)) if i not in taken]
            for i in unused:
                self.pyramid[i] = nn.Identity()
            self.pruned_parts = tuple(f"pyramid.{i}." for i in unused)
            return False
        kept, lost = self._places[: taken[-1] + 1], self._places[taken[-1] + 1 :]
        self.pruned_parts = tuple(f"stages.{i}.blocks.{j}." for i, j in lost)
        self.stages = nn.Sequential(*list(self.stages)[: kept[-1][0] + 1])
        stage: Any = self.stages[-1]
        stage.blocks = stage.blocks[: kept[-1][1] + 1]
        return bool(lost)
