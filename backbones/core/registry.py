"""The model registry, the factory, and the registration with timm."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, TypeVar, cast

import timm.models
import torch
from timm.models import DefaultCfg, PretrainedCfg, generate_default_cfgs
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from backbones.common.checks import flag, several, text, whole
from backbones.common.messages import shown
from backbones.core.base import StagedBackbone
from backbones.core.checkpoint import load_checkpoint, load_pretrained
from backbones.core.keywords import FEATURES
from backbones.fusing.fuse import fuse_network
from backbones.fusing.types import Outputs
from ops.attention.token_pooling import pool_tokens_before, token_attentions
from ops.inference.heap import return_freed_memory
from ops.replay.workspace import workspace

Model = TypeVar("Model", bound=StagedBackbone)
Entrypoint = TypeVar("Entrypoint", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    """One registered architecture."""

    entrypoint: Callable[..., nn.Module]
    family: str
    cfgs: DefaultCfg


PREFIX = "timm/"
"""Of the names of timm's models, wherever ours are accepted."""

_entries: dict[str, _Entry] = {}
_unnamed: dict[FunctionType, type[StagedBackbone]] = {}


def variant(model_class: type[Model], **arguments: Any) -> Callable[..., Model]:
    """An entrypoint of a model: ``model_class(**arguments)``, and :func:`create_model`'s keywords.

    A family's module assigns it to the variant's name, and :func:`register_variants` registers it.
    """

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        return build_model(model_class, entrypoint.__name__, pretrained, arguments, kwargs)

    entrypoint.__doc__ = "{}({}).".format(
        model_class.__name__, ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    )
    _unnamed[cast(FunctionType, entrypoint)] = model_class
    return entrypoint


def register_variants(module: str) -> None:
    """Register each :func:`variant` of a module by the name that it has there.

    ``default_cfgs`` of the module describes their weights, a dict by ``name.tag``, and becomes what
    timm's ``generate_default_cfgs`` makes of it, with the classes' ``first_conv`` and
    ``classifier``. The names are also registered with timm, unless timm has a model of that name. A
    model that can return maps of its stem (``stem_features``) or derive a pyramid from one map
    (``pyramid``) is registered with timm a second time, as ``<name>_pyramid`` with that option on,
    for libraries that create encoders through timm and need a pyramid from stride 2 or 4. Modules
    call it with their ``__name__``, below their variants.
    """
    owner: Any = sys.modules[module]
    classes: dict[str, type[StagedBackbone]] = {}
    for name, value in list(vars(owner).items()):
        if isinstance(value, FunctionType) and value in _unnamed:
            value.__name__ = value.__qualname__ = name
            value.__module__ = module
            classes[name] = _unnamed.pop(value)
    if not classes:
        return
    cfgs = {}
    for name, cfg in getattr(owner, "default_cfgs", {}).items():
        model_class = classes.get(name.partition(".")[0], StagedBackbone)
        paths = {"first_conv": model_class.first_conv, "classifier": model_class.classifier}
        cfgs[name] = {**paths, **cfg}
    owner.default_cfgs = generate_default_cfgs(cfgs)
    for name, model_class in classes.items():
        _register(getattr(owner, name), model_class)


def _register(entrypoint: Callable[..., nn.Module], model_class: type[nn.Module]) -> None:
    name, module = entrypoint.__name__, sys.modules[entrypoint.__module__]
    if name in _entries:
        raise ValueError(f"a model named {name!r} is already registered ({_entries[name].family})")
    cfgs = getattr(module, "default_cfgs", {}).get(name)
    if cfgs is None:
        raise ValueError(f"default_cfgs in {module.__name__} has no entry for {name!r}")
    _entries[name] = _Entry(entrypoint, module.__name__.rsplit(".", 1)[-1], cfgs)
    if not timm.models.is_model(name):
        timm.models.register_model(entrypoint)
    for keyword in ("stem_features", "pyramid"):
        if keyword in inspect.signature(model_class).parameters:
            pyramid = _with_pyramid(entrypoint, keyword)
            module.default_cfgs[pyramid.__name__] = cfgs
            setattr(module, pyramid.__name__, pyramid)
            timm.models.register_model(pyramid)


def _with_pyramid(entrypoint: Callable[..., nn.Module], keyword: str) -> Callable[..., nn.Module]:
    """The entrypoint of ``<name>_pyramid``."""

    @functools.wraps(entrypoint)
    def pyramid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: Any = entrypoint(pretrained=pretrained, **{keyword: True, **kwargs})
        # The name in timm's hub files; the plain name may belong to a timm model.
        model.pretrained_cfg["architecture"] = pyramid.__name__
        return model

    pyramid.__name__ = pyramid.__qualname__ = f"{entrypoint.__name__}_pyramid"
    return pyramid


def register(entrypoint: Entrypoint) -> Entrypoint:
    """Register a function that calls :func:`build_model`; use :func:`variant` instead."""
    text = "register(): assign variant(…) to the name, and call register_variants(__name__)"
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    returned = entrypoint.__annotations__.get("return")
    module = sys.modules[entrypoint.__module__]
    model_class = getattr(module, returned, None) if isinstance(returned, str) else returned
    _register(entrypoint, model_class if isinstance(model_class, type) else nn.Module)
    return entrypoint


def list_models(
    filter: str | Sequence[str] = "", *, pretrained: bool = False, family: str | None = None
) -> list[str]:
    """Names of the models, sorted.

    Args:
        filter: shell pattern or patterns, such as ``"van*"``; empty for all.
        pretrained: only those whose weights can be downloaded, as ``name.tag``.
        family: only those of one family, see :func:`list_families`.
    """
    if family is not None and text("family", family) not in list_families():
        raise ValueError(_unknown("family", family, list_families()))
    flag("pretrained", pretrained)
    patterns = [filter] if isinstance(filter, str) else several(text)("filter", filter)
    names = []
    for name, entry in _entries.items():
        if family is not None and entry.family != family:
            continue
        if any(patterns) and not any(fnmatch.fnmatch(name, p) for p in patterns):
            continue
        if pretrained:
            names += [f"{name}.{tag}" for tag, cfg in entry.cfgs.cfgs.items() if cfg.has_weights]
        else:
            names.append(name)
    return sorted(names)


def list_families() -> list[str]:
    """Names of the families, sorted: each is a module of ``backbones``."""
    return sorted({entry.family for entry in _entries.values()})


def create_model(
    name: str, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kwargs: Any
) -> Any:
    """Create a model by name.

    Args:
        name: a name of :func:`list_models`, or ``name.tag`` to select weights; ``timm/NAME`` or
            ``timm/NAME.TAG`` for any model of timm, whose keywords these are then.
        pretrained: download (and cache) the published weights and load them.
        checkpoint_path: load this file instead, see :func:`backbones.load_checkpoint`.
        features_only: return a model that maps an image to a list of feature maps.
        out_indices: the maps to return with ``features_only``; default: all of them or, in
            single-resolution networks, where they count blocks, those after each quarter.
        pretrained_cfg, pretrained_cfg_overlay: replace, or partly replace, the default cfg.
        token_pooling: put a :class:`ops.attention.token_pooling.TokenPooling` with this number of
            scales (4 in the paper) before each attention; 0 for none.
        **kwargs: arguments of the architecture: ``num_classes``, ``in_chans``, ``drop_rate``,
            ``drop_path_rate``, ``global_pool``, … A value of None means the default, as in timm.

    Raises:
        ValueError: an unknown name or tag, or an argument out of range.
        TypeError: an unknown keyword, or a value of another type.
        CheckpointError: weights that don't fit, see :func:`backbones.load_checkpoint`.
    """
    architecture, _, tag = text("name", name).partition(".")
    flag("pretrained", pretrained)
    if architecture.startswith(PREFIX):
        return _create_timm_model(name, pretrained, checkpoint_path, **kwargs)
    if architecture not in _entries:
        raise ValueError(_unknown("model", name, list(_entries)))
    if tag:
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or tag
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    entrypoint = _entries[architecture].entrypoint
    return entrypoint(pretrained=pretrained, checkpoint_path=checkpoint_path, **kwargs)


def _create_timm_model(
    name: str, pretrained: bool, checkpoint_path: str | Path | None, **kwargs: Any
) -> nn.Module:
    plain = name.removeprefix(PREFIX)
    architecture, _, tag = plain.partition(".")
    if not timm.models.is_model(architecture):
        raise ValueError(_unknown("model", name, [PREFIX + n for n in timm.models.list_models()]))
    weights = timm.models.list_models(f"{architecture}.*", pretrained=True)
    if tag and plain not in weights:
        raise ValueError(
            _unknown(f"tag of {architecture}", tag, [n.partition(".")[2] for n in weights])
        )
    model = timm.create_model(plain, pretrained=pretrained, **kwargs)
    if checkpoint_path not in (None, ""):
        assert checkpoint_path is not None
        load_checkpoint(model, checkpoint_path)
    return model


def build_model(
    model_class: type[StagedBackbone],
    name: str,
    pretrained: bool,
    defaults: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """Create ``model_class(**defaults, **kwargs)``, load weights, and wrap it for features.

    ``kwargs`` are the caller's, of :func:`create_model` and of the class.
    """
    options = dict(kwargs)
    checkpoint_path = options.pop("checkpoint_path", None)
    features_only = flag("features_only", options.pop("features_only", False))
    out_indices = options.pop("out_indices", None)
    cache_dir = options.pop("cache_dir", None)
    # Stored in timm's hub files; timm reads it from the model afterwards.
    saved_with: Any = options.pop("pretrained_model_args", {})
    token_pooling = whole(0, 64)("token_pooling", options.pop("token_pooling", 0))
    cfg = _resolve_cfg(
        name, options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None)
    )
    if out_indices is not None:
        out_indices = FEATURES("out_indices", out_indices)
        if not features_only:
            raise TypeError("out_indices requires features_only=True")
    valid = list(inspect.signature(model_class).parameters)
    for keyword in options:
        if keyword not in valid:
            raise TypeError(f"{name}: {_unknown('keyword', keyword, valid)}")

    arguments = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0], **defaults}
    model = model_class(**{**arguments, **options})
    if token_pooling:
        _pool_tokens(model, token_pooling)
    model.pretrained_cfg = model.default_cfg = cfg.to_dict()
    model.pretrained_model_args = saved_with
    if checkpoint_path not in (None, ""):
        load_checkpoint(model, checkpoint_path)
    elif pretrained:
        load_pretrained(model, name, cfg, published_weights(name), cache_dir)
    if not features_only:
        return model
    if out_indices is None:
        out_indices = tuple(model.default_features())
    features = FeatureGetterNet(model, out_indices=out_indices)
    features.pretrained_cfg = features.default_cfg = model.pretrained_cfg
    return features


def _pool_tokens(model: Any, scales: int) -> None:
    """Put token-aware average pooling before each attention; modifies the model in place."""
    found = 0
    for stage, index in zip(model.stages, model.stage_features(), strict=True):
        for attention in token_attentions(stage):
            pool_tokens_before(attention, model.feature_info[index]["num_chs"], scales)
            found += 1
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that supports token_pooling")


def published_weights(name: str) -> dict[str, PretrainedCfg]:
    """The cfgs of a model by tag, with and without a URL."""
    return dict(_entries[name].cfgs.cfgs)


def fuse(
    model: nn.Module,
    dtype: torch.dtype | Literal["auto"] | None = None,
    channels_last: bool | Literal["auto"] = "auto",
    *,
    calibrate: Iterable[Any] | Tensor | None = None,
    max_drop: float | None = None,
    outputs: Outputs = "input",
) -> nn.Module:
    """Optimise a model for inference: one of this library, or any other in eval mode.

    Modifies ``model`` in place and returns it. If backbones of this library are inside, they are
    fused, see :meth:`backbones.fusing.fuse.FusableBackbone.fuse`; ``dtype`` converts only them.
    Other networks, such as those of timm, torchvision and transformers, keep their layers and
    weights, which no longer require gradients: on a CPU, their calls with one tensor are recorded
    as operators, rewritten to kernels of this library, and replayed (:mod:`ops.rewriting`). Outputs
    are equal up to rounding. Calls that need gradients of images, hooks inside, tracing or
    autocast, or whose course depends on values, run as before.

    Args:
        dtype, channels_last, calibrate, max_drop, outputs: see
            :meth:`backbones.fusing.fuse.FusableBackbone.fuse`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    backbones = [m for m in model.modules() if isinstance(m, StagedBackbone)]
    if not backbones:
        fuse_network(model, dtype, channels_last, calibrate, max_drop, outputs)
    options: Any = {"calibrate": calibrate, "max_drop": max_drop, "outputs": outputs}
    for backbone in backbones:
        backbone.fuse(dtype, channels_last, **options)
    return model


def empty_cache() -> None:
    """Release the memory that fused models keep on the CPU for their next calls.

    Without this, they keep a workspace as large as the largest call needed, until 16 calls in a row
    need less than half of it. Concurrent calls have separate workspaces. With glibc, malloc returns
    what it keeps for their maps, up to 256 MiB.
    """
    workspace.clear()
    return_freed_memory()


def _resolve_cfg(
    name: str, given: str | dict[str, Any] | PretrainedCfg | None, overlay: dict[str, Any] | None
) -> PretrainedCfg:
    """The cfg to use: the default, a tag's, or the caller's, with the overlay applied."""
    cfgs = _entries[name].cfgs
    if given is None:
        tag, cfg = cfgs.default_with_tag
        cfg = replace(cfg, tag=tag or None)
    elif isinstance(given, str):
        if given not in cfgs.cfgs:
            raise ValueError(_unknown(f"tag of {name}", given, [t for t in cfgs.tags if t]))
        cfg = replace(cfgs.cfgs[given], tag=given)
    elif isinstance(given, Mapping):
        cfg = PretrainedCfg(**given)
    elif isinstance(given, PretrainedCfg):
        cfg = given
    else:
        raise TypeError(f"pretrained_cfg must be a tag, a dict or a PretrainedCfg, got {given!r}")
    if not isinstance(overlay, Mapping | None):
        raise TypeError(f"pretrained_cfg_overlay must be a dict, got {overlay!r}")
    cfg = replace(cfg, architecture=name, **(overlay or {}))
    several(whole(1, 1 << 20), count=3)("input_size of pretrained_cfg", cfg.input_size)
    return cfg


def _unknown(kind: str, value: str, valid: Sequence[str]) -> str:
    """An error message with the closest valid names, or all of them if none is close."""
    message = f"unknown {kind} {value!r}"
    near = difflib.get_close_matches(value, valid, n=4, cutoff=0.5)
    if near:
        return f"{message}; did you mean {', '.join(map(repr, near))}?"
    if kind == "model":
        families = ", ".join(list_families())
        return f"{message}; backbones.list_models() lists all names; the families are {families}"
    return f"{message}; valid: {', '.join(map(repr, sorted(valid)))}"
