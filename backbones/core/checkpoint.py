"""Loading of published checkpoints: read, unwrap, convert and fit, with a strict report."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, load_state_dict_from_hf
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from backbones.common.checkpoint_files import CheckpointError, read_file
from backbones.common.checks import flag
from backbones.common.download import downloaded, is_url
from backbones.common.messages import joined_lines, shown
from backbones.core.base import StagedBackbone
from backbones.core.vit_adapter import ViTAdapter
from backbones.fusing.fuse import fuse_network
from backbones.fusing.int8_state import dequantized, set_quantization

_logger = logging.getLogger(__name__)

# Averaged weights first: where a file holds both, they are the published ones.
_WRAPPERS = (
    "params_ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model",
    "module",
    "params",
)
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "pixel_level_module.encoder.")
# Prefixes of backbones inside detectors, whose other tensors are ignored.
_BACKBONES = ("backbone.", "pixel_level_module.encoder.")
# Files that timm's ``save_for_hf`` writes, in order of preference.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN = 5
# Maximum depth of nested wrappers; beyond it, a checkpoint contains itself.
_DEEPEST = 20


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_checkpoint`; all lists contain the model's own names.

    Attributes:
        source: where the weights came from.
        missing: tensors of the model that the checkpoint lacks.
        unexpected: tensors of the checkpoint that the model lacks.
        resized: tensors adapted to another number of input channels or another table size.
        reinitialised: tensors left at their initial values: a classifier with another number of
            classes, or output norms that a classification checkpoint lacks.
        nonfinite: loaded tensors that contain NaN or infinite values.
        ignored: tensors outside the backbone (a detector's heads).
    """

    source: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {kind} ({_some(names)})"
            for kind, names in vars(self).items()
            if kind != "source" and names
        ]
        return f"loaded {self.source}" + (": " + "; ".join(parts) if parts else "")


def load_checkpoint(
    model: nn.Module, source: str | Path | Mapping[str, Any], strict: bool = True
) -> LoadReport:
    """Load weights into a model: our own, the original's, or a detector's that contains it.

    The original's names are converted, ``in_chans`` and tables are adapted, and a classifier with
    another number of classes keeps its initial weights. If the weights were saved after ``fuse()``,
    the model is fused first; those of ``int8_state_dict()`` make it one in int8, where the CPU
    multiplies it. The model is modified only if everything fits.

    Args:
        model: a backbone, a ``features_only=True`` wrapper of one, or a
            :class:`backbones.ViTAdapter`; or a model of timm, into which its own state dict, or
            that in int8, is loaded, whole and whatever ``strict`` is.
        source: a ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file, an http(s) URL of one, or
            a loaded state dict.
        strict: whether missing and unexpected tensors, and NaN or infinite weights, are errors.

    Returns:
        Names of missing, unexpected, resized, reinitialised, non-finite and ignored tensors.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, a damaged one, or one that does not fit; it names the
            file and the first tensors. (Files of ``torch.save`` since torch 1.6 have checksums;
            in older files and safetensors, only damage to the structure is detected.)
        ConnectionError: a URL could not be fetched completely, or the server timed out.
        TypeError: another model, or another kind of source.
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    flag("strict", strict)
    if not _is_of_timm(model):
        _backbone_of(model)
    return load_tensors(model, read_checkpoint(source), name, strict)


def load_tensors(
    model: nn.Module, tensors: dict[str, Tensor], name: str, strict: bool = True
) -> LoadReport:
    """:func:`load_checkpoint` of what :func:`read_checkpoint` has read from ``name``."""
    tensors, ignored = strip_prefixes(tensors)
    tensors, in_int8 = dequantized(tensors, name)
    report = LoadReport(name, ignored=ignored)
    is_ours = not _is_of_timm(model)
    backbone: Any = _backbone_of(model) if is_ours else model
    target, is_fused = backbone, False
    # Prefixes of parts that the model lacks, that may be missing, or of other classes.
    absent: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ()
    if is_ours:
        try:
            tensors = backbone.convert_state_dict(tensors)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # The original's names, on tensors of other ranks.
            raise CheckpointError(
                f"{name} does not fit {type(backbone).__name__}: it cannot be converted ({error})"
            ) from error
        heads = backbone.classifier
        parts = getattr(backbone, "optional_parts", ())
        classifiers = (*(f"{h}." for h in ((heads,) if isinstance(heads, str) else heads)), *parts)
        optional = ("out_norms.", "pyramid.", "token_pooling.", "adapter.", *parts)
        absent = _absent_parts(backbone, isinstance(model, FeatureGetterNet))
        target = _fused_like(backbone, tensors, absent) or backbone
        is_fused = target.fused
    own = target.state_dict()

    fitted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in own and (reason := _mismatch(tensor, own[key])):
            raise CheckpointError(f"{name}: {key} {reason}, but the model's is {own[key].dtype}")
        if key not in own:
            (report.ignored if key.startswith(absent) else report.unexpected).append(key)
        elif tensor.shape == own[key].shape:
            fitted[key] = tensor
        elif is_ours and (resized := target.resize_tensor(key, tensor, own[key].shape)) is not None:
            fitted[key] = resized
            report.resized.append(key)
        elif key.startswith(classifiers):
            report.reinitialised.append(key)
        else:
            raise CheckpointError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, but the model's is "
                f"{tuple(own[key].shape)}; is it a checkpoint of another variant?"
            )
    for part in optional:  # not in published weights
        if not any(part in key for key in tensors):
            report.reinitialised.extend(key for key in own if part in key)
    spared = {*fitted, *report.reinitialised}
    report.missing.extend(
        key for key in own if key not in spared and not key.endswith("num_batches_tracked")
    )
    strict = strict or not is_ours
    if not fitted or (strict and (report.missing or report.unexpected)):
        raise CheckpointError(
            f"{name} does not fit {'the fused ' if is_fused else ''}{type(backbone).__name__}: "
            f"{len(report.missing)} tensors missing ({_some(report.missing)}), "
            f"{len(report.unexpected)} unexpected ({_some(report.unexpected)})"
            + (
                "; load weights from before fuse() before fusing"
                if is_fused and target is backbone
                else ""
            )
        )
    report.nonfinite.extend(not_finite({k: t.to(own[k].dtype) for k, t in fitted.items()}))
    if strict and report.nonfinite:
        raise CheckpointError(_not_finite_text(name, report.nonfinite))
    if target is not backbone:
        backbone.fuse(channels_last=False if in_int8 else "auto")
    backbone.load_state_dict(fitted, strict=False)
    if in_int8 and not isinstance(backbone, ViTAdapter):
        set_quantization(backbone, in_int8)
        fuse_network(backbone, torch.int8, is_backbone=is_ours)
    if any(names for kind, names in vars(report).items() if kind not in ("source", "ignored")):
        _logger.warning("%s", report)
    return report


def _is_of_timm(model: nn.Module) -> bool:
    is_ours = isinstance(model, StagedBackbone | ViTAdapter | FeatureGetterNet)
    return not is_ours and isinstance(getattr(model, "pretrained_cfg", None), Mapping)


def _backbone_of(model: nn.Module) -> StagedBackbone | ViTAdapter:
    backbone = model.model if isinstance(model, FeatureGetterNet) else model
    if not isinstance(backbone, StagedBackbone | ViTAdapter):
        raise TypeError(f"expected a backbone of this library, got {type(model).__name__}")
    return backbone


def read_checkpoint(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without wrappers.

    Pickles are read with ``weights_only=True``: files that would execute code are rejected.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, "state dict")
    if not isinstance(source, str | Path):
        raise TypeError(
            "a checkpoint must be a path, a URL or a mapping of tensors by name, got "
            f"{_briefly(source)}"
        )
    if is_url(str(source)):
        with downloaded(str(source)) as path:
            return _unwrap(read_file(path), str(source))
    if not Path(source).is_file():
        raise FileNotFoundError(f"no checkpoint at {source}")
    return _unwrap(read_file(Path(source)), str(source))


def require_finite(model: nn.Module, source: str) -> None:
    """Raise a CheckpointError for NaN or infinite weights, which came from ``source``.

    :func:`load_checkpoint` includes this check; this is for weights loaded by other means.
    """
    if bad := not_finite(model.state_dict()):
        raise CheckpointError(_not_finite_text(source, bad))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that contain NaN or infinite values."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()  # aminmax does not support float8
    # A single pass without a mask of the tensor's size; NaN propagates to both results.
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) and torch.isfinite(greatest))


def _not_finite_text(source: str, names: list[str]) -> str:
    return f"{source} has NaN or infinite weights: {_some(names)}"


def load_pretrained(
    model: nn.Module,
    name: str,
    cfg: PretrainedCfg,
    published: Mapping[str, PretrainedCfg],
    cache_dir: str | Path | None = None,
) -> LoadReport:
    """Load the published weights of a model: from its cfg, the cache (torch hub's), or the network.

    ``cfg`` has a ``file`` (or a folder written by timm's ``save_for_hf``), a ``state_dict``, a
    ``url`` or a ``hf_hub_id``; if none, an error lists the ``published`` ones, by tag.
    """
    if cfg.state_dict is not None:
        return load_checkpoint(model, cfg.state_dict)
    if cfg.file:
        path = Path(cfg.file)
        file = next((path / file for file in _HUB_FILES if (path / file).is_file()), path)
        return load_checkpoint(model, file)
    if cfg.hf_hub_id:
        tensors = load_state_dict_from_hf(cfg.hf_hub_id, weights_only=True, cache_dir=cache_dir)
        return load_checkpoint(model, tensors)
    if cfg.url:
        url = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
        with downloaded(url, name, cache_dir) as path:
            return load_checkpoint(model, path)
    fetchable = [f"{name}.{tag}" for tag, other in published.items() if other.url]
    by_hand = [note for other in published.values() for note in other.notes or ()]
    if fetchable:
        hint = f"available: {', '.join(fetchable)}"
    elif by_hand:
        hint = f"download them manually and pass checkpoint_path=; {' '.join(by_hand)}"
    else:
        hint = "its authors published none"
    raise CheckpointError(f"{name} has no downloadable weights: {hint}")


def _unwrap(content: Any, name: str) -> dict[str, Tensor]:
    """The innermost mapping of tensors."""
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{name} is not a state dict, but {_briefly(content)}")
        wrapper = next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if wrapper is None:
            tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
            if not tensors:
                keys = _some([str(key) for key in content])
                raise CheckpointError(f"{name} has no state dict (keys {keys})")
            return tensors
        content = content[wrapper]
    raise CheckpointError(f"{name} has no state dict: its {wrapper!r} contains itself")


def strip_prefixes(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the prefixes of wrappers, and the tensors of a detector outside its backbone."""
    ignored: list[str] = []
    while prefix := next((p for p in _PREFIXES if any(k.startswith(p) for k in tensors)), None):
        kept: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if prefix in _BACKBONES and not key.startswith((prefix, "head.")):
                ignored.append(key)
                continue
            bare = key.removeprefix(prefix)
            if bare in kept:
                raise CheckpointError(f"the checkpoint has both {prefix + bare!r} and {bare!r}")
            kept[bare] = tensor
        tensors = kept
    return tensors, ignored


def _absent_parts(model: StagedBackbone | ViTAdapter, pruned: bool) -> tuple[str, ...]:
    """Name prefixes of parts that a full checkpoint has and this model lacks.

    These are identities after the stages (dense networks have no final norm, networks without
    classes no classifier) and the layers that ``features_only`` removed.
    """
    optional = tuple(part.removesuffix(".") for part in getattr(model, "optional_parts", ()))
    absent = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.Identity)
        and name.removeprefix("network.").split(".")[0] in ("norm", "head", *optional)
    ]
    if pruned and isinstance(model, StagedBackbone):
        absent += ["head.", "norm.", "out_norms.", *model.pruned_parts]
    return tuple(absent)


def _fused_like(
    model: StagedBackbone | ViTAdapter, tensors: dict[str, Tensor], absent: tuple[str, ...]
) -> StagedBackbone | ViTAdapter | None:
    """A fused copy of ``model`` if all or most of the tensors belong to that form, else None.

    ``absent`` are name prefixes that the model may lack.
    """
    names = {key for key in tensors if not key.startswith(absent)}
    foreign = len(names - model.state_dict().keys())
    if isinstance(model, ViTAdapter) or model.fused or not foreign:
        return None
    fused = copy.deepcopy(model).fuse()
    fits_less = len(names - fused.state_dict().keys()) >= min(foreign, len(names) / 2)
    return None if fits_less else fused


def _mismatch(tensor: Tensor, own: Tensor) -> str:
    """Why ``tensor`` can't be copied into ``own``, of the same shape, without loss; else ""."""
    if tensor.is_meta:
        return "has no data (it is on the meta device)"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "is sparse or quantised"
    if tensor.is_complex() and not own.is_complex():
        return "is complex"
    if own.is_floating_point() and not tensor.is_floating_point():
        return f"is of {tensor.dtype}"
    if not own.is_floating_point() and not torch.equal(
        tensor.to(own.dtype).to(tensor.dtype), tensor
    ):
        return "contains non-integers"
    return ""


def _some(names: list[str]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(joined_lines(name, 80) for name in names[:_SHOWN]) + more if names else "none"


def _briefly(value: Any) -> str:
    """Type and value of an object that is not a checkpoint, on one line."""
    return "None" if value is None else f"{type(value).__name__} {shown(value)}"
