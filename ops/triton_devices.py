"""Whether Triton's kernels can run on a device, without importing triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

# Multiply and add in one rounding. This is Triton's default until 3.10; 3.9 warns about the change
# unless a launch says what it wants.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

_OLDEST_TRITON = (3, 4)


def _problem_of_installation() -> str | None:
    """Why the installed triton is unusable; None if it is usable."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Nightly builds have other package names, and are recent enough.
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton 3.4 or newer is needed, found {version}"
    return None


_PROBLEM = _problem_of_installation()  # once: looking for packages is slow


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def problem_of(tensor: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why Triton's kernels can't compute such tensors, of these dtypes; None if they can.

    Args:
        dtypes: of the kernels; by default float32, float16 and bfloat16.
    """
    dtypes = dtypes or (torch.float32, torch.float16, torch.bfloat16)
    if tensor.dtype not in dtypes:
        return f"the kernels compute in {', '.join(map(str, dtypes))}, got {tensor.dtype}"
    if _PROBLEM is not None:
        return _PROBLEM
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and _interpreting()):
        return (
            f"the kernels need a CUDA device, got {tensor.device.type} "
            "(on the CPU they run only in the interpreter, with TRITON_INTERPRET=1)"
        )
    if tensor.device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels are written for NVIDIA's GPUs"
        if torch.cuda.get_device_properties(tensor.device).major < 8:
            return f"the kernels need compute capability 8.0 or newer, {tensor.device} has less"
    return None
