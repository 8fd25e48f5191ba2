"""The fast path of ``fuse()``: a folded model's layers become their inference forms, in place.

What stands for what is in two tables: one for the layers of ``ops`` and timm, one for the blocks
of the families. A model file knows nothing of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import timm.layers
import torch
from torch import nn

from backbones._base import StagedBackbone
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
from ops.inference.recorded import Recorded, recorded_form
from ops.kan import KANLayer
from ops.mlp import DWMlp

__all__ = ["fast_form", "put_channels_last"]


# Of a block of memory; glibc's threshold follows the size of what is freed up to here.
_LARGEST_KEPT_BYTES = 31 << 20


def put_channels_last(model: nn.Module, *, always: bool) -> None:
    """Run a folded model on maps with channels last: where it is faster, or ``always``.

    On a CPU with oneDNN all layers get their inference forms, where they have one; elsewhere only
    the convolutions' weights change their memory format. Parameters stop asking for gradients:
    with them the plain forms would run. A second call finds nothing to do.
    """
    model.requires_grad_(False)
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not layers.has_onednn(weight.dtype):
        if always:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return
    for module in list(model.modules()):
        fast = fast_form(module)
        if fast is not None:
            layers.convert(module, fast)
    for module in list(model.modules()):
        _absorb_activations(module)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let the maps of one image find the memory of the image before.

    glibc gives large blocks back to the system when they are freed, and each of their pages then
    costs a fault when the next map is written: a tenth to a fifth of the time of small networks. It
    keeps blocks as large as the largest that a process has freed (``man mallopt``,
    M_MMAP_THRESHOLD). This one is never touched, so it takes no memory.
    """
    torch.empty(_LARGEST_KEPT_BYTES, dtype=torch.uint8)


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
    if isinstance(module, StagedBackbone) and not isinstance(module, Recorded):
        return recorded_form(type(module))
    if type(module) is timm.layers.ConvMlp and not isinstance(module.norm, nn.Identity):
        return None
    return _forms().get(type(module))


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
        setattr(module, act, nn.Identity())
