"""Ray as the engine: the table is the same, even if a machine is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from embedding_runs import make_photos, same, words
from ray.cluster_utils import Cluster

from backbones.cli.main import main
from backbones.embedding import embed, table

# A complete cluster on this machine; Ray's processes start slowly.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two machines with one core each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = Cluster(initialize_head=True, head_node_args=_NODE)
    try:
        started.add_node(**_NODE)
        started.wait_for_nodes(timeout=120)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def test_a_lost_machine(cluster, checkpoint, tmp_path):
    photos = make_photos(tmp_path / "photos", 400)
    (photos / "none.jpg").write_text("no image")
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert main(words(photos, undisturbed, checkpoint)) == 1
    lost: list[int] = []

    def lose() -> None:
        """Kill the second machine after the first shards."""
        while (shards := len(list(out.glob("shards/part-*")))) < 5:
            time.sleep(0.005)
        cluster.remove_node(list(cluster.list_all_nodes())[1], allow_graceful=False)
        lost.append(shards)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    done = embed(
        photos,
        out,
        checkpoint=checkpoint,
        rows=4,
        batch_size=3,
        engine="ray",
        address=cluster.address,
    )
    thread.join()
    assert lost[0] < 101, "it was lost too late"
    assert (done.rows, [key for key, _ in done.corrupt]) == (400, ["none.jpg"])
    keys, _ = table.load(out)
    assert len(set(keys)) == len(keys) == 400
    assert same(out, undisturbed)
