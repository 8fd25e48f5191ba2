"""Published checkpoints, loaded as they are: read, unwrap, convert, fit, and report strictly."""

from __future__ import annotations

import argparse
import copy
import logging
import pathlib
import pickle
import urllib.error
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import PretrainedCfg, load_state_dict_from_hf
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from backbones._base import StagedBackbone

__all__ = [
    "HARMLESS",
    "LOG_BUFFER",
    "CheckpointError",
    "LoadReport",
    "fetch_pretrained",
    "load_checkpoint",
    "read_checkpoint",
]

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
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")
# What timm's ``save_for_hf`` writes into a folder, the better first.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN = 5


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did; all lists hold the model's own names.

    Attributes:
        source: where the weights came from.
        missing: tensors of the model that the checkpoint lacks.
        unexpected: tensors of the checkpoint that the model lacks.
        resized: tensors that were fitted to another number of input channels or table size.
        reinitialised: tensors left as they were made: a classifier for another number of classes,
            output norms where a classification checkpoint has none.
        ignored: tensors of parts around the backbone (a detector's heads).
    """

    source: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {kind} ({_some(names)})"
            for kind, names in vars(self).items()
            if kind != "source" and names
        ]
        return f"loaded {self.source}" + (": " + "; ".join(parts) if parts else "")


class _LogBuffer:
    """In place of mmengine's log buffers, whose content is of no use here."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


def _statistic(owner: Any, name: str) -> Any:
    """What a pickle's ``getattr`` may do: name a statistic of a log buffer."""
    if name not in ("min", "max", "current", "mean"):
        raise ValueError(f"a checkpoint may not read {name!r} of {owner!r}")
    return getattr(owner, name, None)


def _harmless() -> Iterator[Any]:
    """Plain values that training scripts leave in their checkpoints beside the tensors."""
    yield from (argparse.Namespace, pathlib.PurePosixPath, pathlib.PosixPath)
    yield pathlib.PureWindowsPath
    yield from (np.ndarray, np.dtype)
    yield from (type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?"))
    for made, name in ((np.empty(0), "_reconstruct"), (np.float64(0), "scalar")):
        # NumPy 2 moved these; a checkpoint holds the name of the version that wrote it.
        for module in ("numpy.core", "numpy._core"):
            yield made.__reduce__()[0], f"{module}.multiarray.{name}"
    yield _statistic, "builtins.getattr"


# What weights-only loading may meet besides tensors: all that mmengine saves but its log buffers.
HARMLESS: tuple[Any, ...] = tuple(_harmless())
LOG_BUFFER = "mmengine.logging.history_buffer.HistoryBuffer"


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    strict: bool = True,
) -> LoadReport:
    """Load weights into a model: ours, the original's, or those of a detector around it.

    The original's names are converted, ``in_chans`` and tables are fitted, and a classifier for
    another number of classes is left as it is. Weights that were saved after ``fuse()`` fuse the
    model first. The model is changed only if everything fits.

    Args:
        model: a backbone, or what ``features_only=True`` made of one.
        source: a ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file, an http(s) URL of one, or
            its content.
        strict: whether missing and unexpected tensors are an error.

    Returns:
        What was missing, unexpected, resized, reinitialised or ignored.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, or one that does not fit; it names the file and the
            first tensors.
        ConnectionError: a URL that could not be fetched.
    """
    pruned = isinstance(model, FeatureGetterNet)
    backbone = model.model if pruned else model
    if not isinstance(backbone, StagedBackbone):
        raise TypeError(f"expected a backbone of this library, got {type(model).__name__}")
    name = "state dict" if isinstance(source, Mapping) else str(source)
    tensors, ignored = _strip_prefixes(read_checkpoint(source))
    tensors = backbone.convert_state_dict(tensors)
    heads = (backbone.classifier,) if isinstance(backbone.classifier, str) else backbone.classifier
    absent = _absent_parts(backbone, pruned)
    target = _fused_like(backbone, tensors, absent) or backbone
    own = target.state_dict()
    report = LoadReport(name, ignored=ignored)

    fitted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        is_classifier = any(key.startswith(f"{head}.") for head in heads)
        if key not in own:
            (report.ignored if key.startswith(absent) else report.unexpected).append(key)
        elif tensor.shape == own[key].shape:
            fitted[key] = tensor
        elif (resized := target.resize_tensor(key, tensor, own[key].shape)) is not None:
            fitted[key] = resized
            report.resized.append(key)
        elif is_classifier:
            report.reinitialised.append(key)
        else:
            raise CheckpointError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, but the model's is "
                f"{tuple(own[key].shape)}; is it a checkpoint of another variant?"
            )
    if not any(key.startswith("out_norms.") for key in tensors):
        report.reinitialised.extend(key for key in own if key.startswith("out_norms."))
    spared = {*fitted, *report.reinitialised}
    report.missing.extend(
        key for key in own if key not in spared and not key.endswith("num_batches_tracked")
    )
    if not fitted or (strict and (report.missing or report.unexpected)):
        raise CheckpointError(
            f"{name} does not fit {type(backbone).__name__}: "
            f"{len(report.missing)} tensors missing ({_some(report.missing)}), "
            f"{len(report.unexpected)} unexpected ({_some(report.unexpected)})"
        )
    if target is not backbone:
        backbone.fuse()
    backbone.load_state_dict(fitted, strict=False)
    if report.missing or report.unexpected or report.resized or report.reinitialised:
        _logger.warning("%s", report)
    return report


def read_checkpoint(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of whatever wraps them.

    Pickles are read with ``weights_only=True``: a file that would run code is refused.

    Raises:
        FileNotFoundError, CheckpointError, ConnectionError: see :func:`load_checkpoint`.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, "state dict")
    name = str(source)
    if urlparse(name).scheme in ("http", "https"):
        path = _download(name, Path(urlparse(name).path).name, None)
    else:
        path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return _unwrap(_read_file(path), name)


def fetch_pretrained(
    name: str,
    cfg: PretrainedCfg,
    published: Mapping[str, PretrainedCfg],
    cache_dir: str | Path | None = None,
) -> Path | dict[str, Tensor]:
    """The published weights of a model: from its cfg, the cache, or the network.

    Args:
        name: of the model, for messages and the cache.
        cfg: names a ``file`` (or the folder that timm's ``save_for_hf`` wrote), a ``state_dict``,
            a ``url`` or a ``hf_hub_id``.
        published: all cfgs of the model by tag, for the message where ``cfg`` has no weights.
        cache_dir: default torch hub's.

    Raises:
        CheckpointError: no weights that can be downloaded were published.
        ConnectionError: the network failed; it says what to fetch and where to put it.
    """
    if cfg.state_dict is not None:
        return cfg.state_dict
    if cfg.file:
        path = Path(cfg.file)
        return next((path / file for file in _HUB_FILES if (path / file).is_file()), path)
    if cfg.hf_hub_id:
        return load_state_dict_from_hf(cfg.hf_hub_id, weights_only=True, cache_dir=cache_dir)
    if cfg.url:
        url = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
        return _download(url, f"{name}-{Path(urlparse(url).path).name}", cache_dir)
    fetchable = [f"{name}.{tag}" for tag, other in published.items() if other.url]
    by_hand = [note for other in published.values() for note in other.notes or ()]
    if fetchable:
        hint = f"there are: {', '.join(fetchable)}"
    elif by_hand:
        hint = f"fetch them by hand and pass checkpoint_path=; {' '.join(by_hand)}"
    else:
        hint = "its authors published none"
    raise CheckpointError(f"{name} has no weights that can be downloaded: {hint}")


def _download(url: str, filename: str, cache_dir: str | Path | None) -> Path:
    """The file at ``url``, downloaded once with a progress bar; it appears in the cache whole."""
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / filename
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=True)
    except (urllib.error.URLError, OSError) as error:
        raise ConnectionError(
            f"could not fetch {url} ({error}); download it elsewhere and save it as {path}, "
            "or pass checkpoint_path="
        ) from error
    return path


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        # Not what is allowed anyway: leaving the context would forbid it.
        always = torch.serialization.get_safe_globals()
        allowed = [k for k in (*HARMLESS, (_LogBuffer, LOG_BUFFER)) if k not in always]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            # Protocols other than 2 load as well, or fail with an error of their own.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, or is not a checkpoint; it was "
            f"not run ({reason}). If you trust it, save its state dict alone and load that."
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {reason}") from error


def _unwrap(content: Any, name: str) -> dict[str, Tensor]:
    """The innermost mapping of tensors."""
    while isinstance(content, Mapping):
        wrapper = next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if wrapper is None:
            tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
            break
        content = content[wrapper]
    found = (
        f"keys {_some([str(k) for k in content])}" if isinstance(content, Mapping) else "no dict"
    )
    raise CheckpointError(f"{name} holds no state dict ({found})")


def _strip_prefixes(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove what wrappers put before every name; drop what a detector has beside its backbone."""
    ignored: list[str] = []
    while prefix := next((p for p in _PREFIXES if any(k.startswith(p) for k in tensors)), None):
        kept = {}
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                kept[key.removeprefix(prefix)] = tensor
            elif prefix == "backbone." and not key.startswith("head."):
                ignored.append(key)
            else:
                kept[key] = tensor
        tensors = kept
    return tensors, ignored


def _absent_parts(model: StagedBackbone, pruned: bool) -> tuple[str, ...]:
    """Beginnings of names that a whole checkpoint has and this model does without.

    Those are what stands as an identity after the stages (a dense network has no final norm, one
    without classes no classifier) and what ``features_only`` cut off.
    """
    absent = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.Identity) and name.split(".")[0] in ("norm", "head")
    ]
    if pruned:
        cut = range(len(model.stages), len(model.feature_info))
        absent += ["head.", "norm.", "out_norms.", *(f"stages.{i}." for i in cut)]
    return tuple(absent)


def _fused_like(
    model: StagedBackbone, tensors: dict[str, Tensor], absent: tuple[str, ...]
) -> StagedBackbone | None:
    """A fused copy of ``model`` if the tensors belong to that form, else None.

    ``absent`` are the beginnings of names that the model may lack.
    """
    names = {key for key in tensors if not key.startswith(absent)}
    if model.fused or names <= model.state_dict().keys():
        return None
    fused = copy.deepcopy(model).fuse()
    return fused if names <= fused.state_dict().keys() else None


def _some(names: list[str]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"
