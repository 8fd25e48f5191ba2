"""``vision-backbones verify``: identify a checkpoint, load it, and check outputs.

Two comparisons are made stage by stage. With deterministic synthetic weights, outputs are compared
with the original's recorded figures, which tests the code on this machine. With the user's weights,
they are compared with figures saved elsewhere by ``--save-figures``, which tests checkpoint,
machine and versions together.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import backbones
from backbones.cli import parity
from backbones.cli.common import add_size_argument, read_text, two_sides
from backbones.common.arguments import nonempty_path
from backbones.common.checkpoint_files import sha256_of
from backbones.common.errors import CommandError, memory_shortage
from backbones.common.files import write_text_atomically
from backbones.common.messages import one_line, shown
from backbones.common.outputs import add_overwrite, json_of, json_text, require_writable
from backbones.common.tables import count_text, table
from backbones.core.checkpoint import read_checkpoint, strip_prefixes
from backbones.core.loaded import create, load
from backbones.core.outlines import outlines
from backbones.core.registry import published_weights

EXAMPLE = "van_b0 --checkpoint van_tiny_754.pth.tar"

_SHOWN = 3


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="model, or a checkpoint file (default: the checkpoint's model)")
    text = "weights (default: test only the code)"
    add("--checkpoint", type=nonempty_path, metavar="FILE", help=text)
    saved = "save figures of every stage, to compare elsewhere"
    add("--save-figures", type=nonempty_path, metavar="JSON", help=saved)
    add("--figures", type=nonempty_path, metavar="JSON", help="compare with saved figures")
    add_size_argument(parser, "image size for --save-figures (default: the model's)")
    add_overwrite(parser)


def run(options: Namespace) -> int:
    """Run ``verify``; 1 if the checkpoint does not load, or an output differs."""
    word = options.model or ""
    if options.checkpoint is None and word not in backbones.list_models() and os.path.isfile(word):
        options.model, options.checkpoint = None, Path(word)
    require_writable(
        {"--save-figures": (options.save_figures, json_of("model"))},
        [options.checkpoint, options.figures],
        options.overwrite,
    )
    if options.checkpoint is None:
        if options.model is None:
            raise CommandError("give a MODEL, a --checkpoint FILE, or both")
        if options.figures is not None or options.save_figures is not None:
            raise CommandError("figures depend on weights: give --checkpoint FILE")
        create(options.model)  # raises for an unknown name
        return int(not _verify_code(options.model))
    if not options.checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {options.checkpoint}")
    known = None if options.figures is None else _read_figures(options.figures)
    looks_like = _identify(options.checkpoint)
    name = looks_like if options.model is None else options.model
    if name is None:
        raise CommandError(f"give the MODEL of {options.checkpoint}")
    loads = _verify_loading(name, options.checkpoint)
    if loads is None:
        return 1
    right = _verify_code(loads.name)
    if options.save_figures is not None:
        size = two_sides(options.size, loads.model)
        figures = {"model": loads.name, **make_figures(loads.model, size)}
        write_text_atomically(options.save_figures, json_text(figures))
        sys.stdout.write(f"figures of these weights: saved as {options.save_figures}\n")
    if known is not None:
        right &= _verify_figures(loads, known, options.figures)
    elif options.save_figures is None:
        make_figures(loads.model, two_sides(options.size, loads.model))
        sys.stdout.write(
            "outputs of these weights: nothing to compare with; run with\n  --save-figures "
            "figures.json where they are correct, then with --figures figures.json here\n"
        )
    return int(not right)


def make_figures(model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Shape, mean, deviation, norm and first values of every stage's map and of the output.

    The image is deterministic, see :func:`backbones.cli.parity.image`.
    """
    shape, seed = (1, model.in_chans, *size), 0
    values = _outputs(model, parity.image(shape, seed))
    if not all(value.isfinite().all() for value in values):
        raise CommandError("the outputs of these weights are not finite")
    *stages, output = map(parity.summary, values)
    facts = {"torch": torch.__version__, "input": list(shape), "seed": seed}
    return {**facts, "stages": stages, "output": output}


def compare(model: Any, figures: dict[str, Any]) -> list[tuple[str, float]]:
    """Relative error of every stage and of the output against :func:`make_figures`."""
    try:
        shape, seed = figures["input"], figures["seed"]
        if math.prod(shape) > _LARGEST_INPUT:
            raise ValueError(f"an input of {shape} is too large")
        values = _outputs(model, parity.image(shape, seed))
        expected = [*figures["stages"], figures["output"]]
        errors = [parity.summary_error(*pair) for pair in zip(values, expected, strict=True)]
    except _UNFIT as error:
        if memory_shortage(error) is not None:
            raise
        raise CommandError(f"the figures are for a different model: {error}") from error
    return _named(errors)


def _named(errors: list[float]) -> list[tuple[str, float]]:
    """The errors of the stages and of the output, with these names."""
    names = [*(f"stage {number}" for number in range(1, len(errors))), "output"]
    return list(zip(names, errors, strict=True))


def _outputs(model: Any, images: Tensor) -> list[Tensor]:
    """The maps of the stages and the output."""
    images = images.to(next(model.parameters()).dtype)
    with torch.inference_mode():
        maps = model.forward_intermediates(images, intermediates_only=True)
        return [value.float() for value in (*maps, model(images))]


class Match(NamedTuple):
    """A published model, and the names of the tensors in which a file differs, by kind."""

    family: str
    variant: str
    kinds: dict[str, list[str]]

    @property
    def differences(self) -> int:
        """The number of tensors that do not match."""
        return sum(map(len, self.kinds.values()))


def closest(tensors: Mapping[str, Tensor]) -> list[Match]:
    """The published models with the fewest mismatching tensors; several if they tie.

    Args:
        tensors: a checkpoint's, with the original's names. Integers are derived and don't count.
    """
    own = {name: tuple(t.shape) for name, t in tensors.items() if t.is_floating_point()}
    matches = [_match(own, family, variant) for family, variant in parity.variants()]
    least = min(match.differences for match in matches)
    return [match for match in matches if match.differences == least]


def _match(own: dict[str, tuple[int, ...]], family: str, variant: str) -> Match:
    figures = parity.reference(family, variant)
    theirs = {name: tuple(shape) for name, shape in parity.float_shapes(figures)}
    shared = own.keys() & theirs.keys()
    kinds = {
        "missing": sorted(theirs.keys() - shared),
        "unexpected": sorted(own.keys() - shared - set(figures.get("derived", ()))),
        "of another shape": sorted(name for name in shared if own[name] != theirs[name]),
    }
    return Match(family, variant, kinds)


def released_file(variant_figures: Mapping[str, Any], digest: str) -> str | None:
    """The URL of the release with a file's SHA-256 digest, if releases contain checksums.

    OpenMMLab's file names end with the first eight hex digits of the checksum.
    """
    for weights in variant_figures.get("weights") or ():
        name = re.search(r"-([0-9a-f]{8})\.pth", weights.get("url") or "")
        if name is not None and digest.startswith(name[1]):
            return str(weights["url"])
    return None


def _identify(path: Path) -> str | None:
    """Print what the file contains; returns the model that it matches, if any."""
    tensors, around = strip_prefixes(read_checkpoint(path))
    digest = sha256_of(path)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    sys.stdout.write(
        f"{one_line(str(path))}: {len(tensors)} tensors, {count_text(numbers)} values"
        f"{f', and {len(around)} of parts around the backbone' if around else ''}\n"
        f"sha256 {digest}\n"
    )
    matches = closest(tensors)
    if matches[0].differences == 0:
        for match in matches:
            figures = parity.reference(match.family, match.variant)
            file = released_file(figures, digest)
            if file is not None:
                sys.stdout.write(f"release: byte for byte {file}\n")
                return match.variant
        names = " or ".join(match.variant for match in matches)
        sys.stdout.write(
            f"release: names and shapes match the original's {names}; the values can't be\n"
            "  checked, because the authors publish no checksum\n"
        )
        for tag, cfg in published_weights(matches[0].variant).items():
            if cfg.has_weights:
                sys.stdout.write(f"  {matches[0].variant}.{tag}: {cfg.url}\n")
        return matches[0].variant
    ours = _own_form(tensors)
    if ours is not None:
        sys.stdout.write(f"release: none; these are weights of {ours} in this library's format\n")
        return ours
    match = matches[0]
    if match.differences > len(tensors) // 2:
        sys.stdout.write("release: none; it does not resemble any published model\n")
        return None
    differences = _some(match.kinds)
    sys.stdout.write(
        f"release: none; closest is the original's {match.variant}, with {differences}\n"
    )
    return match.variant


def _some(kinds: dict[str, list[str]]) -> str:
    """The number of names of each kind, and the first ones."""
    parts = []
    for kind, names in kinds.items():
        if names:
            more = ", …" if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})")
    return "; ".join(parts)


def _own_form(tensors: dict[str, Tensor]) -> str | None:
    """The variant of this library with these names and shapes, except for the classifier's."""
    own = {name: tuple(t.shape) for name, t in tensors.items() if not name.startswith("head.")}
    if not any(name.startswith("stages.0.") for name in own):
        return None
    published = {
        name: parity.reference(family, name)["params"] for family, name in parity.variants()
    }
    count = sum(tensor.numel() for tensor in tensors.values())
    # Models of about that size first: each takes tens of milliseconds.
    by_size = sorted(backbones.list_models(), key=lambda n: abs(published.get(n, 0) - count))
    for name in by_size:
        with outlines():
            state = backbones.create_model(name).state_dict()
        theirs = {k: tuple(t.shape) for k, t in state.items() if not k.startswith("head.")}
        if theirs == own:
            return name
    return None


def _verify_loading(name: str | None, path: Path) -> Any:
    """Print whether it loads; returns the model, or None if it does not."""
    try:
        loaded = load(name, path)
    except backbones.CheckpointError as error:
        sys.stdout.write(f"loading: fails: {one_line(str(error))}\n")
        return None
    kinds = {k: v for k, v in vars(loaded.report).items() if k != "source" and v}
    text = _some(kinds) or "strictly: all tensors match"
    classes = f", {loaded.model.num_classes} classes" if loaded.model.num_classes else ""
    sys.stdout.write(f"loading: into {loaded.name}{classes}, {text}\n")
    return loaded


def _verify_code(name: str) -> bool:
    """Compare with the original's figures; returns whether all agree."""
    family = next((family for family, variant in parity.variants() if variant == name), None)
    if family is None:
        sys.stdout.write(f"code: no figures of an original are recorded for {name}\n")
        return True
    allowed = parity.tolerance(family, name)
    output, stages = parity.case_errors(family, name, 0)
    sys.stdout.write(
        f"code of {name}, with synthetic weights, compared with the original's figures:\n"
    )
    return _show(_named([*stages, output]), allowed)


def _read_figures(path: Path) -> dict[str, Any]:
    text = read_text(path, "--figures")
    try:
        figures = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not JSON: {error}") from error
    if not isinstance(figures, dict):
        raise CommandError(f"{path} was not written by --save-figures")
    return figures


def _verify_figures(loaded: Any, figures: dict[str, Any], path: Path) -> bool:
    if figures.get("model") != loaded.name:
        of = shown(figures.get("model"))
        raise CommandError(f"{path} has figures for {of}, not for {loaded.name}")
    sys.stdout.write(f"these weights, compared with {path} (torch {figures.get('torch')}):\n")
    return _show(compare(loaded.model, figures), _ALLOWED)


# Relative; kernels of other machines sum in a different order.
_ALLOWED = 1e-4
# Raised for invalid figures, or those of another model.
_UNFIT = (LookupError, TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError)
# Largest input that figures may have: three channels of 8192 × 8192.
_LARGEST_INPUT = 3 * 8192**2


def _show(rows: list[tuple[str, float]], allowed: float) -> bool:
    right = all(error <= allowed for _, error in rows)  # NaN is not
    cells = [[name, f"{error:.1e}", "✓" if error <= allowed else "✗"] for name, error in rows]
    sys.stdout.write(table(("", "error", f"≤ {allowed:.0e}"), cells))
    return right
