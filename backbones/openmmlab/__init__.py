"""Every backbone under mmdet and mmseg, with layer-wise learning rates, mixed precision and necks.

In a config: ``custom_imports = dict(imports=["backbones.openmmlab"])``. This registers
:class:`VisionBackbone` and the necks as models, :class:`CPUAmpOptimWrapper` as an optimizer wrapper
and :class:`LayerDecayConstructor` as an optimizer wrapper constructor in mmengine's registries,
which mmdet and mmseg share. It also replaces mmcv's compiled operators if they are missing, and
allows mmengine's classes in PyTorch's weights-only loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.common.checkpoint_files import HARMLESS, LOG_BUFFER
from backbones.core.checkpoint import load_checkpoint, load_pretrained
from backbones.core.outlines import outlines
from backbones.core.registry import create_model, list_models, published_weights
from backbones.core.vit_adapter import ViTAdapter
from backbones.openmmlab import mmcv_ops
from backbones.openmmlab.necks import SimpleFPN, TransposedFPN

__all__ = [
    "CPUAmpOptimWrapper",
    "LayerDecayConstructor",
    "SimpleFPN",
    "TransposedFPN",
    "VisionBackbone",
    "allow_mmengine_checkpoints",
    "check_channels",
    "without_sync_norm",
]


@MODELS.register_module()
class VisionBackbone(BaseModule):
    """A backbone of this library for a detector or segmenter: images → tuple of maps (B, C, h, w).

    Args:
        name: of :func:`backbones.list_models`.
        out_indices: the maps to return; default: all or, in single-resolution networks, where the
            indices count blocks, those after each quarter.
        drop_path_rate: stochastic depth of the last block; default: the variant's.
        frozen_stages: −1 trains everything, 0 freezes the stem, k also the first k stages; frozen
            norms use running statistics.
        norm_eval: use running statistics in all batch norms during training.
        out_norms: normalise the returned maps: all (True) or the listed stages; for the families
            whose published detectors do so.
        with_cp: recompute each block in the backward pass to save memory.
        in_channels: image channels.
        adapter: arguments of a :class:`backbones.ViTAdapter` around a single-resolution network,
            which then returns maps of strides 4 to 32; ``{}`` for its defaults. Its stochastic
            depth is ``drop_path_rate``.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``: a file or URL of a classification
            or dense checkpoint, the original's or ours, or the name of published weights, such as
            ``"van_b2.in1k"``. Used by :meth:`init_weights`.
        **arguments: further arguments of the architecture (``img_size``, ``n_win``, …).

    ``channels`` and ``reductions`` are those of the returned maps.
    """

    _is_init: bool

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        out_norms: bool | Sequence[int] | None = None,
        with_cp: bool = False,
        in_channels: int = 3,
        adapter: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        if init_cfg is not None and (
            init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}
        ):
            raise ValueError(
                "init_cfg must be dict(type='Pretrained', checkpoint=...), which finds the "
                f"backbone inside a detector by itself, got {init_cfg}"
            )
        super().__init__(dict(init_cfg) if init_cfg is not None else None)
        common = dict(num_classes=0, in_chans=in_channels, out_norms=out_norms, **arguments)
        common["drop_path_rate"] = drop_path_rate
        self.model: Any
        if adapter is None:
            indices = None if out_indices is None else tuple(out_indices)
            self.model = create_model(name, features_only=True, out_indices=indices, **common)
            # Without the layers after the maps: distributed training fails for parameters that
            # get no gradients.
            self.network.head = nn.Identity()
        else:
            if out_indices is not None:
                raise ValueError(
                    "an adapter returns four maps, of strides 4 to 32; leave out_indices unset, "
                    f"got {out_indices}"
                )
            rate = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
            self.model = ViTAdapter(create_model(name, **common), **{**rate, **adapter})
        stages = len(self.network.stages)
        if not -1 <= frozen_stages <= stages:
            raise ValueError(
                f"frozen_stages must be −1 (none), 0 (the stem) … {stages}, got {frozen_stages}"
            )
        self.name = name
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.channels: list[int] = self.model.feature_info.channels()
        self.reductions: list[int] = self.model.feature_info.reduction()
        (self.network if adapter is None else self.model).set_grad_checkpointing(with_cp)
        for part in self._frozen_parts():
            part.requires_grad_(False)

    @property
    def network(self) -> Any:
        """The backbone itself, inside the wrapper that returns its maps."""
        return self.model.network if isinstance(self.model, ViTAdapter) else self.model.model

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, if any."""
        if self.init_cfg and not self._is_init:
            _load(self.model, self.init_cfg["checkpoint"])
        self._is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(x))

    def train(self, mode: bool = True) -> VisionBackbone:
        """Like ``nn.Module.train``, but frozen parts stay in eval mode."""
        super().train(mode)
        if mode:
            for part in self._frozen_parts():
                part.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.network.stem, *list(self.network.stages)[: self.frozen_stages]]


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU, which mmengine's ``AmpOptimWrapper`` does not support.

    Training steps run under PyTorch's autocast to bfloat16; parameters, their gradients and the
    optimizer stay in float32, and losses need no scaling. Evaluation runs in float32, as with
    mmengine's wrapper. Arguments are those of mmengine's ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the forward pass and the losses of a step."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rate decay from the backbone's last layer to its stem.

    Layers are defined by the backbone's ``group_matcher``. Parameters outside the backbone, such
    as an adapter's, have the full rate, its last layer ``decay_rate`` times that, the previous one
    ``decay_rate``² times. Vectors, biases and parameters in the backbone's ``no_weight_decay`` have
    no weight decay.

    ``paramwise_cfg`` has the single key ``decay_rate``, in (0, 1]; 1 for equal rates.
    """

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: int | float | None = None,
    ) -> None:
        if set(self.paramwise_cfg) != {"decay_rate"}:
            raise ValueError(
                f"paramwise_cfg must be dict(decay_rate=...), got {dict(self.paramwise_cfg)}"
            )
        rate = self.paramwise_cfg["decay_rate"]
        if not 0 < rate <= 1:
            raise ValueError(f"decay_rate must be in (0, 1], got {rate}")
        scales, spared = _layer_scales(module, rate)
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim <= 1 or name.endswith(".bias") or name in spared
                groups.setdefault((scales.get(name, 1.0), plain), []).append(parameter)
        for (scale, plain), members in sorted(groups.items(), key=lambda item: item[0]):
            group: dict[str, Any] = {"params": members, "lr": self.base_lr * scale}
            if plain:
                group["weight_decay"] = 0.0
            params.append(group)


def _layer_scales(module: nn.Module, rate: float) -> tuple[dict[str, float], set[str]]:
    """Learning rate factors of the backbone's parameters, and those without weight decay."""
    scales: dict[str, float] = {}
    spared: set[str] = set()
    for prefix, child in module.named_modules():
        if isinstance(child, VisionBackbone):
            network = child.network
            path = next(n for n, m in child.named_modules() if m is network)
            inner = f"{prefix}.{path}." if prefix else f"{path}."
            layers = group_parameters(network, network.group_matcher(), reverse=True)
            outside = max(layers.values()) + 1
            scales |= {inner + name: rate ** (outside - layer) for name, layer in layers.items()}
            spared |= {inner + name for name in network.no_weight_decay()}
    if not scales:
        raise ValueError(
            f"{type(module).__name__} has no VisionBackbone; for others, use mmengine's own "
            "optimizer-wrapper constructor"
        )
    return scales, spared


def check_channels(model: Mapping[str, Any]) -> None:
    """Raise a ValueError if a config's neck, or decode heads without one, expect other maps.

    It says what to write. Nothing is built; invalid arguments of the backbone are errors, too.
    """
    backbone = model.get("backbone", {})
    if backbone.get("type") != "VisionBackbone":
        return
    arguments = {key: value for key, value in backbone.items() if key not in ("type", "init_cfg")}
    with outlines():
        channels = VisionBackbone(**arguments).channels
    if model.get("neck"):
        parts = _parts(model, "neck")[:1]  # of several, the next ones take what it makes
    else:
        parts = [*_parts(model, "decode_head"), *_parts(model, "auxiliary_head")]
    for part, cfg in parts:
        wanted = cfg.get("in_channels")
        index: Any = cfg.get("in_index")
        if index is None:
            index = -1 if isinstance(wanted, int) else range(len(channels))
        single = isinstance(index, int)
        try:
            fitting = channels[index] if single else [channels[i] for i in index]
        except IndexError:
            raise ValueError(
                f"{part}.in_index={index}, but {backbone['name']} returns {len(channels)} maps: "
                f"write {'one' if single else 'some'} of 0 … {len(channels) - 1}"
            ) from None
        if (list(wanted) if isinstance(wanted, list | tuple) else wanted) != fitting:
            raise ValueError(
                f"{part}.in_channels={wanted} does not match {backbone['name']}, whose maps at "
                f"out_indices={backbone.get('out_indices')} have {channels} channels; write "
                f"in_channels={fitting}"
            )


def _parts(model: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The configs of an optional or repeated part, with their names."""
    part = model.get(key) or []
    if isinstance(part, Mapping):
        return [(key, part)]
    return [(f"{key}[{i}]", cfg) for i, cfg in enumerate(part)]


def without_sync_norm(cfg: Any) -> Any:
    """Replace synchronised batch norms, which need several processes and GPUs, by plain ones.

    Modifies the config, or a part of one, in place and returns it.
    """
    if isinstance(cfg, dict):
        if cfg.get("type") == "SyncBN":
            cfg["type"] = "BN"
        for value in cfg.values():
            without_sync_norm(value)
    elif isinstance(cfg, list | tuple):
        for value in cfg:
            without_sync_norm(value)
    return cfg


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read what mmengine saves next to the tensors.

    These are its log buffers (NumPy arrays, and names of the buffers' statistics) and the plain
    values that :func:`backbones.load_checkpoint` accepts anyway, such as paths. Nothing else is
    allowed in pickles.
    """
    torch.serialization.add_safe_globals([*HARMLESS, (HistoryBuffer, LOG_BUFFER)])


def _load(model: nn.Module, checkpoint: str) -> None:
    """Load a file, a URL, or published weights by name."""
    name, _, tag = checkpoint.partition(".")
    published = published_weights(name) if name in list_models() else {}
    if tag in published:
        load_pretrained(model, name, published[tag], published)
    else:
        load_checkpoint(model, checkpoint)


mmcv_ops.install()
allow_mmengine_checkpoints()
