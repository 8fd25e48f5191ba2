"""Memory: free, used, and needed by a network for its images."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Measured: workspaces of kernels and, above all, freed tensors below 32 MiB that the allocator
# keeps almost double the live memory.
_MARGIN = 2.0
# Measured: oneDNN keeps 90 KiB of each convolution for a shape of inputs, besides packed weights.
_PRIMITIVE_BYTES = 128 << 10


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors that were created inside the block: ``now`` and at ``peak``.

    And those of the ``weights`` of all ``convolutions``, whose shapes of input and weight it keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.weights = 0
        self.convolutions: set[tuple[torch.Size, torch.Size]] = set()
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) in before or storage in self._known:
                continue
            self._known[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, size)
        if func._schema.name == "aten::conv2d":  # whole in inference mode
            self.weights += args[1].nbytes
            self.convolutions.add((args[0].shape, args[1].shape))
        return out

    def _forget(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors; weights packed by oneDNN have none."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [t.untyped_storage() for t in tensors if not t.is_mkldnn]


@torch.inference_mode()
def measure_memory(network: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, int]:
    """Memory that ``network`` needs for its inputs.

    It is proportional to the input, of which ``x``, (B, C, H, W), is a small one, but as large as
    two windows. The network runs twice, to exclude what it creates and keeps in the first call,
    such as packed weights.

    Returns: peak memory over the pixels of ``x``, with a margin; bytes that a fused network keeps
    for each shape of inputs, above all weights in the layouts that oneDNN chooses for them.
    """
    network(x)
    with (live := _LiveTensors()):
        network(x)
    per_pixel = _MARGIN * live.peak / (x.shape[0] * x.shape[2] * x.shape[3])
    return per_pixel, live.weights + _PRIMITIVE_BYTES * len(live.convolutions)


def used_memory(device: torch.device) -> int:
    """Bytes that this process currently uses on the device or, for a CPU, of main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: what it had at most
        return int(peak_memory(device) * 2**20)
    import resource

    return pages * resource.getpagesize()


def available_memory(device: torch.device, unknown: int = 4 * 2**30) -> int:
    """Available bytes of the GPU, or of main memory within the control group, or ``unknown``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                sizes.append(1024 * int(line.split()[1]))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            sizes.append(max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass
    return min(sizes, default=min(sys.maxsize, unknown))


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB, of the GPU or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
