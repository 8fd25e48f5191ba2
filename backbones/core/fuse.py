"""The fast path of ``fuse()``: a folded model's layers become their inference forms, in place.

What stands for what is in two tables: one for the layers of ``ops`` and timm, one for the blocks
of the families. A model file knows nothing of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from ops import mobile
from ops.attention.bilevel import BiLevelRoutingAttention
from ops.attention.cascaded import CascadedGroupAttention
from ops.attention.factorized import FactorizedAttention, GlobalBranch, LocalBranch
from ops.attention.hilo import HiLoAttention
from ops.attention.large_kernel import DilatedDepthwiseConv2d, LargeKernelAttention
from ops.attention.pooled import PooledAttention
from ops.attention.rank_augmented import RankAugmentedAttention
from ops.attention.single_head import SingleHeadAttention
from ops.attention.window import OverlappingWindowAttention, WindowAttention
from ops.conv import InceptionDWConv2d
from ops.inference import attention as fast_attention
from ops.inference import conv as fast_conv
from ops.inference import factorized, kan, layers, mlp, norm, pooling, stem, window
from ops.inference import mobile as fast_mobile
from ops.kan import KANLayer
from ops.mlp import DWMlp
from ops.replay.module import Recorded, recorded_form

__all__ = [
    "FusedBackbone",
    "fast_form",
    "leave_inference_mode",
    "plain_form",
    "put_channels_last",
    "take_plain_forms",
]


# Of a block of memory; glibc's threshold follows the size of what is freed up to here.
_LARGEST_KEPT_BYTES = 31 << 20


class FusedBackbone(Recorded):
    """What a model's inference form refuses where its layers might compute something else."""

    _parts: tuple[list[nn.Module], list[nn.Module | None]] | None = None

    def compute(self, x: Tensor) -> Tensor:
        self._check(x)
        return super().compute(x)

    def forward_features(self, x: Tensor) -> Any:
        self._check(x)
        return super().forward_features(x)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(x)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]

    def note_parts(self) -> None:
        """Remember what the layers are fused with: those of stages, and others that have a form."""
        stages: Any = self.stages
        within = {m for stage in stages for m in stage.modules()}
        parents = [m for m in self.modules() if m is not self and (m in within or _is_fused(m))]
        self._parts = parents, _children_of(parents)

    def _check(self, x: Any) -> None:
        """Refuse images and layers that the model was not made for.

        Raises:
            TypeError: not a tensor.
            ValueError: an image of another shape, dtype or device than the layers take.
            RuntimeError: a layer has been replaced.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return  # they have no numbers to look at
        with torch._C.DisableTorchFunction():  # a recorder is not to see it
            _require_images(x, self)
        if self._parts is not None and _children_of(self._parts[0]) != self._parts[1]:
            raise RuntimeError(
                f"a layer inside the {type(self).__name__} was replaced after fuse(), which had "
                "made one of it and its neighbours; call fuse() again"
            )


def _children_of(modules: list[nn.Module]) -> list[nn.Module | None]:
    return [child for m in modules for child in m._modules.values()]


def _is_fused(module: nn.Module) -> bool:
    absorbed = layers.AbsorbedActivation
    return plain_form(module) is not None or any(type(m) is absorbed for m in module.children())


def _require_images(x: Any, model: Any) -> None:
    weight, chans = next(model.parameters()), model.in_chans
    wanted = (
        f"{type(model).__name__} takes images (B, {chans}, H, W) of {weight.dtype} "
        f"on {weight.device}"
    )
    if not isinstance(x, Tensor):
        raise TypeError(f"{wanted}, got a {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested tensor" if x.is_nested else f"tensor of layout {x.layout}"
        raise ValueError(f"{wanted}, got a {kind}")
    if weight.is_meta:
        return
    dtype, channels = x.dtype, (chans, chans)
    if model.centres_images:
        dtype, channels = torch.promote_types(dtype, weight.dtype), (1, chans)
    fits = x.ndim == 4 and x.shape[1] in channels and 0 not in x.shape[2:]
    fits &= dtype == weight.dtype or torch.is_autocast_enabled(weight.device.type)
    if not fits or x.device != weight.device:
        raise ValueError(f"{wanted}, got {tuple(x.shape)} of {x.dtype} on {x.device}")


def put_channels_last(model: nn.Module, *, always: bool) -> None:
    """Run a folded model on maps with channels last: where it is faster, or ``always``.

    On a CPU with oneDNN all layers get their inference forms, where they have one; elsewhere only
    the convolutions' weights change their memory format. Parameters stop asking for gradients:
    with them the plain forms would run. Layers that have a form are given it anew.
    """
    model.requires_grad_(False)
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not layers.has_onednn(weight.dtype):
        if always:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return
    # Of all before the first is converted; then what is inside first, which others may need.
    forms = [(module, fast_form(module)) for module in model.modules()]
    for module, fast in reversed(forms):
        if fast is not None and _has_needs(module, fast):
            layers.convert(module, fast)
    for module in list(model.modules()):
        _absorb_activations(module)
    if isinstance(model, FusedBackbone):
        model.note_parts()
    _keep_freed_memory()


def _has_needs(module: nn.Module, fast: type[nn.Module]) -> bool:
    """Whether the layers inside have the forms that this one calls in ways of their own."""
    for name, kinds in getattr(fast, "needs", {}).items():
        part = getattr(module, name)
        parts = part if isinstance(part, nn.Sequential | nn.ModuleList) else (part,)
        if not all(isinstance(m, kinds) for m in parts):
            return False
    return True


def take_plain_forms(model: nn.Module) -> None:
    """Undo what :func:`put_channels_last` did, but for the memory formats."""
    for module in model.modules():
        for name, child in module._modules.items():
            if type(child) is layers.AbsorbedActivation:
                (module._modules[name],) = child.kept
        plain = plain_form(module)
        if plain is not None:
            layers.revert(module, plain)
            vars(module).pop("_parts", None)


def leave_inference_mode(model: nn.Module) -> None:
    """Make tensors of inference mode ordinary ones: torch does not count their changes."""
    ordinary: dict[int, Tensor] = {}  # a tensor may be in several places
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is None or not t.is_inference():
                    continue
                if id(t) not in ordinary:
                    other = t.clone()
                    is_parameter = tensors is module._parameters
                    ordinary[id(t)] = (
                        nn.Parameter(other, t.requires_grad) if is_parameter else other
                    )
                tensors[name] = ordinary[id(t)]  # type: ignore[assignment]


def _keep_freed_memory() -> None:
    """Let the maps of one image find the memory of the image before.

    glibc gives large blocks back to the system when they are freed, and each of their pages then
    costs a fault when the next map is written: a tenth to a fifth of the time of small networks. It
    keeps blocks as large as the largest that a process has freed (``man mallopt``,
    M_MMAP_THRESHOLD). This one is never touched, so it takes no memory.
    """
    torch.empty(_LARGEST_KEPT_BYTES, dtype=torch.uint8, device="cpu")


def fast_form(module: nn.Module) -> type[nn.Module] | None:
    """The class to stand for a layer, or a model, if there is one.

    Subclasses are other layers.
    """
    if type(module) is nn.Linear:
        return layers.FastLinear
    if type(module) is nn.Conv2d:
        return _fast_conv(module)
    if stem.is_stem(module):
        return stem.FastStem
    if isinstance(module, StagedBackbone):
        return recorded_form(type(module), FusedBackbone)
    if type(module) is timm.layers.ConvMlp and not isinstance(module.norm, nn.Identity):
        return None
    return _forms().get(type(module))


def plain_form(module: nn.Module) -> type[nn.Module] | None:
    """The class whose inference form a layer, or a model, has, if it has one."""
    if isinstance(module, FusedBackbone):
        return type(module).__bases__[1]
    return _plain_forms().get(type(module))


@functools.cache
def _plain_forms() -> dict[type[nn.Module], type[nn.Module]]:
    convs = (fast_conv.FastDepthwiseConv2d, layers.FastConv2d, layers.FastPointwiseConv2d)
    return {
        **{fast: plain for plain, fast in _forms().items()},
        **dict.fromkeys(convs, nn.Conv2d),
        layers.FastLinear: nn.Linear,
        stem.FastStem: nn.Sequential,
    }


def _fast_conv(conv: nn.Conv2d) -> type[nn.Module] | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if conv.groups == conv.in_channels == conv.out_channels:
        return fast_conv.FastDepthwiseConv2d
    simple = conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    if conv.kernel_size == (1, 1) and simple:
        return layers.FastPointwiseConv2d
    return layers.FastConv2d


@functools.cache
def _forms() -> dict[type[nn.Module], type[nn.Module]]:
    # The families import the base class, whose fuse() comes here: they cannot be imported above.
    from backbones import _attention_inference, _inference

    return {
        BiLevelRoutingAttention: fast_attention.FastBiLevelRoutingAttention,
        CascadedGroupAttention: fast_mobile.FastCascadedGroupAttention,
        DilatedDepthwiseConv2d: fast_conv.FastDilatedDepthwiseConv2d,
        DWMlp: mlp.FastDWMlp,
        FactorizedAttention: factorized.FastFactorizedAttention,
        GlobalBranch: factorized.FastGlobalBranch,
        HiLoAttention: fast_attention.FastHiLoAttention,
        InceptionDWConv2d: fast_conv.FastInceptionDWConv2d,
        KANLayer: kan.FastKANLayer,
        LocalBranch: factorized.FastLocalBranch,
        LargeKernelAttention: fast_attention.FastLargeKernelAttention,
        OverlappingWindowAttention: window.FastOverlappingWindowAttention,
        PooledAttention: fast_attention.FastPooledAttention,
        RankAugmentedAttention: fast_attention.FastRankAugmentedAttention,
        SingleHeadAttention: fast_mobile.FastSingleHeadAttention,
        WindowAttention: window.FastWindowAttention,
        mobile.ConvFFN: fast_mobile.FastConvFFN,
        mobile.ExpandMerging: fast_mobile.FastExpandMerging,
        mobile.Residual: fast_mobile.FastResidual,
        nn.AdaptiveAvgPool2d: pooling.FastAdaptiveAvgPool2d,
        nn.LayerNorm: norm.FastLayerNorm,
        timm.layers.ConvMlp: mlp.FastConvMlp,
        timm.layers.LayerNorm2d: norm.FastLayerNorm2d,
        timm.layers.Mlp: mlp.FastMlp,
        timm.layers.SqueezeExcite: fast_conv.FastSqueezeExcite,
        **_inference.FORMS,
        **_attention_inference.FORMS,
    }


def _absorb_activations(module: nn.Module) -> None:
    """Let layers apply the activation that follows them; an identity takes its place."""
    if type(module) in (nn.Sequential, stem.FastStem):
        names = list(module._modules)
        for name, following in itertools.pairwise(names):
            _absorb(module, following, (name,))
    for act, names in getattr(module, "followed", {}).items():
        _absorb(module, act, names)


def _absorb(module: nn.Module, act: str, names: Sequence[str]) -> None:
    """``act`` is called after each of the layers ``names``, and nowhere else."""
    kind = layers.activation_kind(module.get_submodule(act))
    before = [module.get_submodule(name) for name in names]
    if kind is not None and all(layers.can_activate(layer) for layer in before):
        for layer in before:
            layers.activate(layer, kind)
        setattr(module, act, layers.AbsorbedActivation(module.get_submodule(act)))
