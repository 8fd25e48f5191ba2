"""The number of threads of a kernel call."""

from __future__ import annotations

import torch

# Work that keeps a thread busy for a few microseconds, about the cost of a parallel region. Using
# fewer threads costs more than compute time: data that the others have just written have to be
# fetched from their caches line by line.
MACS = 1e5  # multiply-adds of matrix products
VALUES = 1 << 14  # of a map that is read once or a few times


def threads_for(work: float, of_a_thread: float) -> int:
    """Torch's threads, or fewer so that each has at least ``of_a_thread`` work; at least 1."""
    return max(1, min(torch.get_num_threads(), int(work / of_a_thread)))
