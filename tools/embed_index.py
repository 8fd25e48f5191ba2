"""The part `index` of benchmark_embed.py: exhaustive search against an HNSW graph."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbones.embedding.hnsw import open_graph
from backbones.embedding.rows import unit
from backbones.embedding.search import search
from backbones.embedding.shard_writer import ShardWriter
from backbones.embedding.table import identity, schema, shard_path, write_metadata

__all__ = ["make_table", "measure_index"]

DIM, ROWS, QUERIES, TOP = 192, 1_000_000, 200, 10
_IN_SHARD = 50_000
# Embeddings of images are concentrated around few directions: see `vectors`.
_LATENT, _CENTRES, _SPREAD = 24, 20_000, 0.5


def vectors(count: int, seed: int) -> np.ndarray:
    """Synthetic embeddings (count, DIM): points around centres in 24 dimensions, mapped to DIM."""
    fixed, chance = np.random.default_rng(0), np.random.default_rng(seed)
    centres = fixed.standard_normal((_CENTRES, _LATENT), np.float32)
    to_dim = fixed.standard_normal((_LATENT, DIM), np.float32)
    points = centres[chance.integers(0, _CENTRES, count)]
    points = points + _SPREAD * chance.standard_normal((count, _LATENT), np.float32)
    return np.maximum(points @ to_dim, 0)  # as behind a ReLU


def make_table(folder: Path, rows: int) -> Path:
    """Write a table of synthetic embeddings."""
    starts = range(0, rows, _IN_SHARD)
    content = {
        **{"model": "synthetic", "weights": {"file": "", "path": "", "sha256": ""}},
        **{"preprocessing": {}, "features": "head", "shape": [DIM], "dim": DIM},
        **{"dtype": "float32", "computed": "float32", "classes": 0, "names": []},
        **{"source": {"kind": "folder", "path": str(folder)}, "images": rows},
        **{"shards": len(starts), "rows": _IN_SHARD, "versions": {}},
    }
    (folder / "shards").mkdir(parents=True)
    write_metadata(folder, content)
    for number, start in enumerate(starts):
        count = min(_IN_SHARD, rows - start)
        with ShardWriter(shard_path(folder, number), schema(DIM), identity(content)) as shard:
            keys = [f"{start + i:08}.jpg" for i in range(count)]
            shard.add(keys, [(375, 500)] * count, vectors(count, 1 + number))
    return folder


def measure_index(folder: Path, rounds: int, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """CPU seconds to build, open and query, and how many of the true matches the graph finds."""
    table = make_table(folder / "table", ROWS)
    queries = vectors(QUERIES, 10**6)
    wanted, exact_one, exact_all = _searched(table, queries, "exact")
    begun = time.process_time()
    open_graph(table)
    build = time.process_time() - begun
    begun = time.process_time()
    graph = open_graph(table)
    opening = time.process_time() - begun
    begun = time.process_time()
    graph.search(unit(queries), TOP)
    inside = time.process_time() - begun
    del graph
    found, graph_one, graph_all = _searched(table, queries, "hnsw")
    shared = [len(a & b) / len(a) for a, b in zip(wanted, found, strict=True)]
    yield {
        **{"part": "index", "model": "synthetic", "rows": ROWS, "dim": DIM, "queries": QUERIES},
        **{
            "build": build,
            "open": opening,
            "graph_query_ms": 1000 * inside / QUERIES,
        },
        **{"exact": [exact_one, exact_all], "hnsw": [graph_one, graph_all]},
        **{"bytes": sum(p.stat().st_size for p in table.glob("hnsw-*"))},
        "recall": float(np.mean(shared)),
    }


def _searched(table: Path, queries: np.ndarray, index: str) -> tuple[list[set[int]], float, float]:
    """The rows found for each query, and the CPU seconds of a call for one query and for all."""
    begun = time.process_time()
    search(table, queries[:1], TOP, index)
    one = time.process_time() - begun
    begun = time.process_time()
    found = search(table, queries, TOP, index)
    return [{match.row for match in row} for row in found], one, time.process_time() - begun
