"""The fast path of ``fuse()``: a folded model's layers become their inference forms, in place.

Importing this module registers the forms of the layers of ``ops``, timm and torch; a family
registers those of its blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ops.inference import (  # noqa: F401  (they register their forms)
    attention,
    conv,
    factorized,
    kan,
    layers,
    mlp,
    mobile,
    neighborhood,
    norm,
    patch,
    pooling,
    stem,
    window,
)
from ops.inference.forms import fast_form, plain_form

__all__ = ["leave_inference_mode", "put_channels_last", "take_plain_forms"]


# Of a block of memory; glibc's threshold follows the size of what is freed up to here.
_LARGEST_KEPT_BYTES = 31 << 20


def put_channels_last(model: nn.Module, *, always: bool) -> bool:
    """Run a folded model on maps with channels last: where it is faster, or ``always``.

    On a CPU with oneDNN all layers get their inference forms, where they have one; elsewhere only
    the convolutions' weights change their memory format. Parameters stop asking for gradients:
    with them the plain forms would run. Layers that have a form are given it anew.

    Returns:
        Whether the layers got their forms.
    """
    model.requires_grad_(False)
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not layers.has_onednn(weight.dtype):
        if always:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return False
    # Of all before the first is converted; then what is inside first, which others may need.
    forms = [(module, fast_form(module)) for module in model.modules()]
    for module, fast in reversed(forms):
        # Forms of blocks hand more than a map to their attention; pooling is for the map alone.
        if hasattr(module, "token_pooling"):
            continue
        if fast is not None and _has_needs(module, fast):
            layers.convert(module, fast)
    for module in list(model.modules()):
        _absorb_activations(module)
    _keep_freed_memory()
    return True


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
