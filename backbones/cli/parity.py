"""Recorded figures of the published models, with their deterministic checkpoints and images.

The figures were measured with the originals' code. Random values come from NumPy's frozen
``RandomState`` stream, so they are the same in every version.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import backbones
from ops.padding import reflect_pad_to_multiple

# In the package in a wheel, with the tests in a checkout.
FOLDER = next(
    folder
    for base in (Path(__file__).parent, Path(__file__).parents[2] / "tests")
    if (folder := base / "reference").is_dir() or base.name == "tests"
)
# ViG-H's recorded outputs and ours of OverLoCK are that far from float64.
TOLERANCE = {
    **{"litv2": 1e-4, "medvitv2": 1e-4, "efficientvit": 1e-4},
    **{"overlock": 2e-5, "vig": 2e-5, "vrwkv_l": 1e-4},
    **{"vanilla_vmamba_tiny": 1.3e-5, "vanilla_vmamba_small": 2.1e-5},
    "vanilla_vmamba_base": 2.1e-5,
}
# In float32, their figures are that far from float64 and so are ours, each in another way. Compared
# in float64, only the figures' distance is left.
IN_FLOAT64 = ("vanilla_vmamba_tiny", "vanilla_vmamba_small", "vanilla_vmamba_base")


def variants() -> list[tuple[str, str]]:
    """All ``(family, variant)`` with figures."""
    files = sorted(FOLDER.glob("*/*.json.gz"))
    return [(f.parent.name, f.name.removesuffix(".json.gz")) for f in files]


@functools.cache
def reference(family: str, variant: str) -> dict[str, Any]:
    """The figures of one variant."""
    return json.loads(gzip.decompress((FOLDER / family / f"{variant}.json.gz").read_bytes()))


def tolerance(family: str, variant: str = "") -> float:
    """Maximum allowed relative error."""
    return TOLERANCE.get(variant, TOLERANCE.get(family, 1e-5))


def uniform(key: str, shape: Iterable[int]) -> np.ndarray:
    """Uniform values in [-1, 1), seeded by ``key``."""
    stream = np.random.RandomState(zlib.crc32(key.encode()))
    return stream.random_sample(tuple(shape)).astype(np.float32) * 2 - 1


def _tensor(name: str, shape: list[int]) -> Tensor:
    """Unit-gain matrices, norms near the identity, positive variances."""
    u = uniform(name, shape)
    if name.endswith("running_var"):
        v = 1 + 0.5 * np.abs(u)
    elif name.endswith(("running_mean", "bias")):
        v = 0.1 * u
    elif len(shape) >= 2 and "relative_position_bias" not in name:
        v = u * np.float32(np.sqrt(3.0 / max(1, int(np.prod(shape[1:])))))
    elif len(shape) >= 2:
        v = 0.5 * u
    else:
        v = 1 + 0.2 * u
    return torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32).reshape(tuple(shape)))


def float_shapes(
    figures: dict[str, Any], rows: Iterable[tuple[str, list[int], str]] | None = None
) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of the tensors in floating point, without those that models derive."""
    derived = set(figures.get("derived", ()))
    for name, shape, dtype in figures["state_dict"] if rows is None else rows:
        if dtype.removeprefix("torch.").startswith(("float", "bfloat")) and name not in derived:
            yield name, shape


def checkpoint(
    figures: dict[str, Any], rows: list[tuple[str, list[int], str]] | None = None
) -> dict[str, Tensor]:
    """The state dict, with the original's names, that ``figures`` were measured with.

    ``rows`` replaces ``figures["state_dict"]``, for another form of the same model. Integer
    tensors are omitted, since models derive them.
    """
    tensors = {name: _tensor(name, shape) for name, shape in float_shapes(figures, rows)}
    for pattern, factor in figures.get("synth_scale", ()):
        for name in tensors:
            if re.search(pattern, name):
                tensors[name] = tensors[name] * factor
    return tensors


def image(shape: Iterable[int], seed: int = 0) -> Tensor:
    """Input batch (B, C, H, W), float32 in [-1, 1)."""
    return torch.from_numpy(uniform(f"image-{seed}", shape))


def relative_error(value: Tensor, expected: Any) -> float:
    """Maximum difference relative to the maximum expected magnitude."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = (value.detach().double().reshape(expected.shape) - expected).abs().max()
    return (difference / expected.abs().max()).item()


def summary(value: Tensor) -> dict[str, Any]:
    """Shape, mean, deviation, norm and first values of a map, for :func:`summary_error`."""
    value = value.detach().double()
    return {
        "shape": list(value.shape),
        "mean": value.mean().item(),
        "std": value.std(unbiased=False).item(),
        "l2": value.norm().item(),
        "first8": value.flatten()[:8].tolist(),
    }


def summary_error(value: Tensor, figures: dict[str, Any]) -> float:
    """Maximum relative error of a map against its summary; the shapes must be equal.

    The standard deviation only sets the scale, since mean and norm determine it.
    """
    assert list(value.shape) == figures["shape"], (value.shape, figures["shape"])
    value = value.detach().double()
    first = torch.tensor(figures.get("first8") or figures["first64"], dtype=torch.float64)
    scale = max(first.abs().max().item(), figures["std"])
    errors = [
        (value.flatten()[: len(first)] - first).abs().max().item() / scale,
        abs(value.mean().item() - figures["mean"]) / scale,
        abs(value.norm().item() / figures["l2"] - 1),
    ]
    return max(errors)


@torch.no_grad()
def case_errors(family: str, variant: str, number: int) -> tuple[float, list[float]]:
    """Relative errors of a case with the synthetic checkpoint: the output's, each stage's map's."""
    figures = reference(family, variant)
    case = figures["cases"][number]
    chosen = {k: v for k, v in case.get("kwargs", {}).items() if k == "n_win"}
    model = backbones.create_model(variant, **chosen).eval()
    report = backbones.load_checkpoint(model, checkpoint(figures))
    assert not (report.missing or report.unexpected or report.resized or report.reinitialised)

    x = image(case["input"], case["seed"])
    if variant in IN_FLOAT64:
        model, x = model.double(), x.double()
    if "image" in case:
        # These maps were measured on the padded image; ours have the size of the image.
        padded = reflect_pad_to_multiple(x, model.window_size)
        maps = model.forward_intermediates(padded, intermediates_only=True)
        error = summary_error(model(x), case["image"])
    else:
        last, maps = model.forward_intermediates(x)
        error = _logits_error(model.forward_head(last), case)
    # Compare the maps passed from stage to stage. Where the original's dense copy normalises its
    # features (dense_extra) or returns only the last, these are `stage_outputs`.
    ends = model.stage_features()
    others = figures.get("dense_extra") or len(case["features"]) < len(ends)
    inner = others and "stage_outputs" in case
    stages = case.get("features_eps1e-6") or case["stage_outputs" if inner else "features"]
    if "block_outputs" in case:  # single-resolution networks
        stages = [case["block_outputs"][i] for i in ends]
    if figures.get("last_feature_normed"):
        maps[ends[-1]] = last
    return error, [
        summary_error(_like(maps[i], expected), expected)
        for i, expected in zip(ends, stages, strict=True)
    ]


def _logits_error(logits: Tensor, case: dict[str, Any]) -> float:
    """Error of the logits; with thousands of classes, of the first 1000 and of a summary."""
    if "logits" in case:
        return relative_error(logits, case["logits"])
    first = case["logits_first1000"]
    return max(
        relative_error(logits.flatten()[: len(first)], first),
        summary_error(logits, case["logits_summary"]),
    )


def _like(value: Tensor, figures: dict[str, Any]) -> Tensor:
    """``value`` as tokens (B, HW, C) where the figures are of tokens."""
    return value if len(figures["shape"]) == value.ndim else value.flatten(2).transpose(1, 2)
