"""Embed images that are not in a table in the same way as those that are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.common.checkpoint_files import sha256_of
from backbones.common.dtypes import check_dtype
from backbones.common.errors import CommandError, MendableError
from backbones.common.files import file_problem
from backbones.common.resizing import Resizing
from backbones.embedding.network import Network
from backbones.embedding.table import differences, metadata

__all__ = ["Queries", "embed_queries"]

_BATCH = 16  # as of `embed`


@dataclass
class Queries:
    """Embedded queries, and those that could not be read.

    Attributes:
        paths: of the images that could be read.
        vectors: their embeddings, (n, dim).
        unreadable: the other paths, with reasons.
    """

    paths: list[Path]
    vectors: np.ndarray
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


def embed_queries(
    folder: str | Path, paths: Sequence[str | Path], checkpoint: str | Path | None = None
) -> Queries:
    """Embed files with the model, weights and preprocessing of a table.

    Args:
        checkpoint: file of the weights, if it was moved since the table was made.
    """
    said = metadata(folder)
    network = Network(said["model"], _weights(folder, said, checkpoint), said["features"], 0)
    made = {"shape": network.shape, "preprocessing": network.preprocessing}
    if different := differences(said, said | json.loads(json.dumps(made))):
        raise MendableError(f"{folder} was made with other settings: {'; '.join(different)}")
    device, computed = torch.device("cpu"), said["computed"]
    try:
        check_dtype(computed, device)
    except CommandError:  # computed on a GPU, or in a dtype that this CPU cannot multiply
        computed = "float32"
    network.prepare(computed, device, _BATCH)
    resize = Resizing(said["preprocessing"])
    queries = Queries([], np.empty((0, said["dim"]), np.float32))
    vectors = [queries.vectors]
    for start in range(0, len(paths), _BATCH):
        decoded = []
        for path in map(Path, paths[start : start + _BATCH]):
            pixels, reason = resize.read(path)
            if pixels is None:
                queries.unreadable.append((path, reason))
            else:
                decoded.append(pixels)
                queries.paths.append(path)
        if decoded:
            vectors.append(network.of_pixels(decoded, resize, _BATCH)[0].numpy())
    queries.vectors = np.concatenate(vectors)
    return queries


def _weights(folder: str | Path, said: dict[str, Any], checkpoint: str | Path | None) -> Path:
    """The file of the weights; it must be byte-identical to the table's."""
    weights = said["weights"]
    path = Path(checkpoint or weights.get("path") or weights["file"])
    if (problem := file_problem(path)) is not None:
        raise MendableError(
            f"the weights that {folder} was made with, {path}, cannot be read: it {problem}; pass "
            "their new path as --checkpoint"
        )
    if (found := sha256_of(path)) != weights["sha256"]:
        raise MendableError(
            f"{path} is not the file that {folder} was made with, {weights['file']}: its SHA-256 "
            f"is {found[:16]}…, not {weights['sha256'][:16]}…"
        )
    return path
