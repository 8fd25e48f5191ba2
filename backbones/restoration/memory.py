"""How much memory a network needs for a tile: measured on a small one, then scaled by its area."""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.training.progress import peak_memory

__all__ = ["available_memory", "bytes_per_pixel", "live_bytes", "peak_bytes", "used_memory"]

# Measured: what kernels take for themselves and, above all, what the allocator keeps of tensors
# below 32 MiB after they are freed make almost twice of what is alive.
_MARGIN = 2.0
# oneDNN and cuDNN may repack what goes in and what comes out.
_REPACKING = ("aten::convolution", "aten::mkldnn_convolution", "aten::_convolution")


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._see(storage, before)
        if func._schema.name in _REPACKING:
            packed = args[0].untyped_storage().nbytes() + out.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now + packed)
        return out

    def _see(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        if id(storage) in before or storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Those of all tensors; weights that oneDNN has packed have none."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [t.untyped_storage() for t in tensors if not t.is_mkldnn]


@torch.inference_mode()
def bytes_per_pixel(network: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Peak memory of ``network(x)`` over the pixels of ``x``, with a margin.

    Args:
        network: whose memory grows as its input does, as that of windows and convolutions. It runs
            twice: what it makes at its first call and keeps, as packed weights, is no pixel's.
        x: (B, C, H, W), small but as large as two windows.
    """
    network(x)
    return _MARGIN * live_bytes(network, x) / (x.shape[0] * x.shape[2] * x.shape[3])


def live_bytes(network: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The most bytes of tensors made by ``network(x)`` that are alive at once."""
    live = _LiveTensors()
    with live:
        network(x)
    return live.peak


def peak_bytes(network: nn.Module, shape: Sequence[int]) -> float:
    """Bytes that ``network`` takes for an input of that shape, beside its weights; without running.

    A copy of it is followed on the meta device. Nothing is added for what kernels take for
    themselves and what the allocator keeps.

    Args:
        network: of plain layers; fused ones work in tiles, as many calls as the size asks for.
        shape: of float32 values (B, C, H, W).

    Returns:
        Infinity if no address space would hold one of its tensors.
    """
    shadow = copy.deepcopy(network).to("meta").eval()
    try:
        with torch.inference_mode():
            return live_bytes(shadow, torch.empty(*shape, device="meta"))
    except RuntimeError as error:
        if "calculation overflowed" in str(error):
            return math.inf
        raise


def used_memory(device: torch.device) -> int:
    """Bytes that this process has on the device now; for a CPU, of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: what it had at most
        return int(peak_memory(device) * 2**20)
    import resource

    return pages * resource.getpagesize()


def available_memory(device: torch.device, unknown: int = 4 * 2**30) -> int:
    """Bytes that could still be taken: of the GPU; of the machine and its control group.

    Args:
        unknown: the answer where the system does not say.
    """
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
