"""How many threads a kernel's call gets."""

from __future__ import annotations

import torch

__all__ = ["MACS", "VALUES", "threads_for"]

# What keeps a thread busy for a few microseconds, which is about what it costs to share the work
# out. Fewer threads would not only compute for longer: what the others have just written has to
# come from their caches, line by line.
MACS = 1e5  # multiply-adds of matrix products
VALUES = 1 << 14  # of a map that is read once, or few times


def threads_for(work: float, of_a_thread: float) -> int:
    """Those of torch, or as many as have at least ``of_a_thread`` of the work each; at least 1."""
    return max(1, min(torch.get_num_threads(), int(work / of_a_thread)))
