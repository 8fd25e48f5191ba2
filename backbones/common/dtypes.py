"""The dtypes that commands compute in (``--dtype``), and which of them a device supports."""

from __future__ import annotations

import torch

from backbones.common.errors import CommandError
from backbones.common.messages import shown
from ops.cpu import bfloat16, policy
from ops.cpu.gemm.int8 import not_faster_in_int8

COMPUTED = {
    **{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
    "int8": torch.int8,
}
DTYPES = (*COMPUTED, "auto")  # of ``--dtype``


def check_dtype(computed: str, device: torch.device) -> str:
    """A name in :data:`COMPUTED`: for ``"auto"``, the dtype that this CPU is faster in.

    Raises:
        CommandError: the device does not support the dtype, or is not faster in it.
    """
    if computed not in DTYPES:
        raise CommandError(f"--dtype must be {', '.join(DTYPES)}, not {shown(computed)}")
    if device.type != "cpu":
        if computed in ("int8", "auto"):
            raise CommandError(
                f"--dtype {computed} is for CPUs; GPUs support float16, bfloat16 or float32"
            )
        return computed
    if computed == "auto":
        return str(bfloat16.faster_dtype()).removeprefix("torch.")
    if computed == "float16":
        raise CommandError("--dtype float16 is for GPUs; CPUs support int8, bfloat16 or float32")
    if computed == "bfloat16" and not policy.multiplies(torch.bfloat16):
        raise CommandError(
            "--dtype bfloat16: this CPU has no bfloat16 instructions (AMX, AVX512-BF16), so "
            "float32 is faster; leave the option out"
        )
    if computed == "int8" and (reason := not_faster_in_int8(device)) is not None:
        raise CommandError(f"--dtype int8: {reason}; leave the option out")
    return computed
