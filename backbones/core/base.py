"""The implementation of timm's model API that all families share.

A family assembles ``stem``, ``stages`` (of :class:`Stage`), ``norm`` and ``head`` and calls
:meth:`StagedBackbone.describe_features`. Everything that timm, its feature extractors, its
optimizers and our checkpoint loader need is derived from those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import adapt_input_conv
from torch import Tensor, nn

from backbones.common.checks import one_of
from backbones.core.keywords import FEATURES, KEYWORDS, POOLINGS, checked
from backbones.core.published import Rename, renamed
from backbones.core.stage import Stage, map_of
from backbones.fusing.fuse import FusableBackbone
from ops.arguments import require_tensor


class StagedBackbone(FusableBackbone):
    """Stem → stages → norm → head.

    Subclasses set ``stem``, ``stages``, ``norm`` and ``head`` (with ``reset(num_classes,
    pool_type)`` and ``forward(x, pre_logits=False)``, as timm's ``ClassifierHead``), then call
    :meth:`describe_features`.

    Families share these keywords; a constructor lists those that it has.

    Args:
        dims, depths, num_heads: channels, blocks and attention heads of each stage; ``dim`` of all.
        mlp_ratio, mlp_ratios: width of the MLPs relative to the stage's, of all or each stage.
        stem_dim, head_hidden_dim: channels of the first convolution, and before the classifier.
        norm_eps: of the norms.
        num_classes, in_chans, global_pool: classes, image channels and pooling, as in timm.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside the MLPs.
        drop_path_rate: stochastic depth of the last block, increasing linearly from 0.
        layer_scale: initial value of the layer scales.
        out_norms: normalise the returned maps, as detectors do: all, none, or the listed stages.
            With ``num_classes=0``, there is then no final norm, if the paper's dense networks have
            none.
        stem_features: also return maps of the stem, at smaller strides than the stages'.
        pyramid: return a pyramid at strides 4 to 32 derived from the last map, not the blocks'
            maps.

    Class attributes:
        classifier: path of the last linear layer (a tuple of paths where there are several).
        first_conv: path of the first convolution, which is adapted to ``in_chans``.
        undecayed: last components of the names of parameters without weight decay, in addition to
            the vectors that timm's optimizers exclude.
        centres_images: whether a mean is subtracted from images first, which promotes their dtype
            and broadcasts a single channel.
        classifies_maps: whether the head returns a map of logits if it does not pool.
        poolings: allowed values of ``global_pool``.
        optional_parts: name prefixes of parts that checkpoints may lack, or have for other classes;
            these keep their initial values.
        renames: patterns of published names of tensors and ours, applied in order. Tensors whose
            names become empty are left out.
    """

    classifier: str | tuple[str, ...] = "head.fc"
    first_conv: str = "stem.conv"
    undecayed: tuple[str, ...] = ()
    centres_images: bool = False
    classifies_maps: bool = False
    poolings: tuple[str, ...] = POOLINGS
    optional_parts: tuple[str, ...] = ()
    renames: tuple[Rename, ...] = ()

    stem: nn.Module
    norm: nn.Module
    head: Any

    @checked()
    def __init__(self, *, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.out_norms = nn.ModuleDict()
        self.stem_taps: tuple[int, ...] = ()
        # Name prefixes of the modules that prune_intermediate_layers removed.
        self.pruned_parts: tuple[str, ...] = ()

    # -- what a family declares ------------------------------------------------------------------

    def describe_features(
        self,
        dims: Sequence[int],
        reductions: Sequence[int] | None = None,
        *,
        head_hidden_size: int | None = None,
        stem_features: Sequence[tuple[int, int, int]] = (),
        out_norms: bool | Sequence[int] = False,
        out_norm_layer: Callable[[int], nn.Module] = LayerNorm2d,
    ) -> None:
        """Declare the feature maps; call it after all submodules have been created.

        Args:
            dims: channels of each stage.
            reductions: stride of each stage relative to the image; default: 4, 8, 16, ….
            head_hidden_size: width before the classifier; default: that of the last stage.
            stem_features: ``(child of stem, channels, reduction)`` of maps inside the stem that
                precede the stages' features, so that a stride-16 network has a full pyramid.
            out_norms: see the class; maps passed to the next stage are not normalised.
            out_norm_layer: creates such a norm from a number of channels; default: layer norm.
        """
        strides = [4 * 2**i for i in range(len(dims))] if reductions is None else reductions
        self.stem_taps = tuple(child for child, _, _ in stem_features)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": chs, "reduction": stride, "module": f"stem.{child}"}
            for child, chs, stride in stem_features
        ]
        self.feature_info += [
            {"num_chs": chs, "reduction": stride, "module": f"stages.{i}"}
            for i, (chs, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self.num_features = dims[-1]
        self.head_hidden_size = head_hidden_size or dims[-1]
        self._check_pooling(self.num_classes)
        for i in _chosen_stages(out_norms, len(dims)):
            self.out_norms[str(i)] = out_norm_layer(dims[i])

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename a published checkpoint's tensors to our names; our own names must be kept.

        Where shapes differ in axes of 1, as of linear layers and pointwise convolutions, ours are
        taken.
        """
        own, converted = self.state_dict(), {}
        for key, tensor in state_dict.items():
            if not (name := renamed(key, self.renames)):
                continue
            shape = own[name].shape if name in own else tensor.shape
            if shape != tensor.shape and _without_ones(shape) == _without_ones(tensor.shape):
                tensor = tensor.reshape(shape)
            converted[name] = tensor
        return converted

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """``tensor`` adapted to ``shape``, or None if that is impossible.

        The first convolution is adapted to another number of input channels; families add tables
        that can be interpolated.
        """
        if (
            name == f"{self.first_conv}.weight"
            and tensor.ndim == 4
            and (tensor.shape[0], *tensor.shape[2:]) == (shape[0], *shape[2:])
        ):
            return adapt_input_conv(shape[1], tensor)
        return None

    # -- features --------------------------------------------------------------------------------

    def count_features(self) -> int:
        """The number of feature maps; after pruning, fewer than in ``feature_info``."""
        return len(self.stem_taps) + len(self.stages)

    def stage_features(self) -> list[int]:
        """The index in ``feature_info`` of each stage's output."""
        return list(range(len(self.stem_taps), len(self.stem_taps) + len(self.stages)))

    def default_features(self) -> list[int]:
        """The maps that ``features_only`` returns without ``out_indices``: all of them."""
        return list(range(self.count_features()))

    # -- running ---------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map, normalised: (B, in_chans, H, W) → (B, num_features, h, w)."""
        require_tensor("x", x)
        return self.norm(map_of(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of the last map; with ``pre_logits``, the classifier's input."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the model and return the selected intermediate maps.

        Args:
            x: (B, in_chans, H, W).
            indices: entries of ``feature_info``: the last n (int), all (None) or a list; negative
                indices count from the end.
            norm: apply the final norm to the last stage's map.
            stop_early: skip the stages after the last selected one; the first return value is
                then that stage's map.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return only the list of maps.

        Returns:
            The normalised last map and the list of selected maps, or only the list.
        """
        require_tensor("x", x)
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken = self._take_indices(indices)
        last, maps = self.take_maps(x, taken, norm, not (stop_early or intermediates_only))
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (last, maps)

    def take_maps(
        self, x: Tensor, taken: Sequence[int], norm: bool, whole: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The last map, and the ``taken`` ones, as :meth:`forward_intermediates` returns them.

        Without ``whole``, stages after the last one taken are skipped.
        """
        last = len(self.stages) - 1
        first_stage = len(self.stem_taps)
        maps = []
        if any(i < first_stage for i in taken):
            assert isinstance(self.stem, nn.Sequential)
            for child, layer in enumerate(self.stem):
                x = layer(x)
                if child in self.stem_taps and self.stem_taps.index(child) in taken:
                    maps.append(x)
        else:
            x = self.stem(x)
        whole = whole or taken[-1] == first_stage + last
        for i, stage in enumerate(self.stages):
            if not whole and first_stage + i > taken[-1]:
                break
            x = stage(x)
            if first_stage + i in taken:
                maps.append(self.stage_feature(i, x, norm and i == last))
        return (self.norm(map_of(x)) if whole else map_of(x)), maps

    def stage_feature(self, stage: int, output: Any, norm: bool = False) -> Tensor:
        """The map of a stage's ``output``, with its output norm or, if ``norm``, the final one."""
        x = map_of(output)
        if str(stage) in self.out_norms:
            x = self.out_norms[str(stage)](x)
        elif norm:
            x = self.norm(x)
        return x

    def _take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Absolute indices into ``feature_info``, ascending."""
        count = self.count_features()
        if indices is None:
            return list(range(count))
        indices = FEATURES("indices", indices)
        if isinstance(indices, int):
            taken = list(range(count - indices, count))
        else:
            taken = sorted({i + count if i < 0 else i for i in indices})
        if not taken or taken[0] < 0 or taken[-1] >= count:
            raise ValueError(
                f"{type(self).__name__} has {count} feature maps (indices 0 … {count - 1}, or "
                f"-{count} … -1; an int means the last n ≥ 1), got {indices!r}"
            )
        return taken

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the selected maps don't need; returns their absolute indices."""
        taken = self._take_indices(indices)
        cut = self.prune_stages(taken)
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken

    def prune_stages(self, taken: Sequence[int]) -> bool:
        """Remove the layers that precede norm and head; whether the last map is one of another."""
        first_stage = len(self.stem_taps)
        kept = max(1, taken[-1] + 1 - first_stage)
        cut = kept < len(self.stages)
        self.pruned_parts = tuple(f"stages.{i}." for i in range(kept, len(self.stages)))
        self.stages = nn.Sequential(*list(self.stages)[:kept])
        for key in list(self.out_norms):
            if int(key) + first_stage not in taken:
                del self.out_norms[key]
        if cut:
            self.num_features = self.feature_info[first_stage + kept - 1]["num_chs"]
            self.head_hidden_size = self.num_features
        return cut

    # -- classifier ------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The last linear layer, or a tuple of them."""
        if isinstance(self.classifier, str):
            return self.get_submodule(self.classifier)
        return tuple(self.get_submodule(path) for path in self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by an untrained one; with 0 classes, pooled features are returned.

        ``global_pool`` is the new pooling (``""`` for none); default: unchanged.
        """
        num_classes = KEYWORDS["num_classes"]("num_classes", num_classes)
        self._check_pooling(num_classes, global_pool)
        self.head.reset(num_classes, global_pool)
        weight = next(self.parameters())
        self.head.to(weight.device, weight.dtype).train(self.training)
        self.num_classes = num_classes

    def _check_pooling(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reject unknown poolings, and classifiers without pooling."""
        if global_pool is None:
            global_pool = getattr(getattr(self.head, "global_pool", None), "pool_type", "")
        one_of(*self.poolings)("global_pool", global_pool)
        if num_classes and global_pool == "" and not self.classifies_maps:
            raise ValueError(
                "global_pool='' does not pool the map (as 'avg' does), so num_classes must be 0, "
                f"got {num_classes}"
            )

    # -- training --------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning-rate decay: stem, each block, the tail.

        ``coarse`` groups by stage. A downsampling layer belongs to the first block after it.
        """
        tail = (99999,)
        if coarse:
            blocks: Any = r"^stages\.(\d+)"
        else:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)", tail),
                (r"^(?:norm|out_norms)\b", tail),
            ]
        return {"stem": r"^stem\b", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay."""
        return {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1] in self.undecayed}


def _without_ones(shape: torch.Size) -> list[int]:
    return [side for side in shape if side != 1]


def _chosen_stages(out_norms: bool | Sequence[int], count: int) -> list[int]:
    if isinstance(out_norms, bool):
        return list(range(count)) if out_norms else []
    chosen = sorted(set(out_norms))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(f"out_norms must name stages 0 … {count - 1}, got {tuple(out_norms)}")
    return chosen
