"""``vision-backbones verify``: identify a checkpoint, load it, and check outputs.

With deterministic synthetic weights, the outputs of every stage are compared with the original's
recorded figures, which tests the code on this machine. Those of the user's weights must be finite.
"""

from __future__ import annotations

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
from backbones.cli.common import add_size_argument, two_sides
from backbones.common.arguments import FILE
from backbones.common.checkpoint_files import sha256_of
from backbones.common.errors import CommandError
from backbones.common.messages import one_line
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
    add("--checkpoint", **FILE, help="weights (default: test only the code)")
    add_size_argument(parser, "image size for the outputs of the checkpoint (default: the model's)")


def run(options: Namespace) -> int:
    """Run ``verify``; 1 if the checkpoint does not load, or an output differs."""
    word = options.model or ""
    if options.checkpoint is None and word not in backbones.list_models() and os.path.isfile(word):
        options.model, options.checkpoint = None, Path(word)
    if options.checkpoint is None:
        if options.model is None:
            raise CommandError("give a MODEL, a --checkpoint FILE, or both")
        create(options.model)  # raises for an unknown name
        return int(not _verify_code(options.model))
    if not options.checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {options.checkpoint}")
    looks_like = _identify(options.checkpoint)
    name = looks_like if options.model is None else options.model
    if name is None:
        raise CommandError(f"give the MODEL of {options.checkpoint}")
    loads = _verify_loading(name, options.checkpoint)
    if loads is None:
        return 1
    right = _verify_code(loads.name)
    model = loads.model
    images = parity.image((1, model.in_chans, *two_sides(options.size, model)))
    with torch.inference_mode():
        output = model(images.to(next(model.parameters()).dtype))
    if not output.isfinite().all():
        raise CommandError("the outputs of these weights are not finite")
    sys.stdout.write("outputs of these weights: finite\n")
    return int(not right)


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
    errors = {f"stage {number}": error for number, error in enumerate(stages, start=1)}
    errors["output"] = output
    cells = [[name, f"{e:.1e}", "✓" if e <= allowed else "✗"] for name, e in errors.items()]
    sys.stdout.write(table(("", "error", f"≤ {allowed:.0e}"), cells))
    return all(error <= allowed for error in errors.values())  # NaN is not
