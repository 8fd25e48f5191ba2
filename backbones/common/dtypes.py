"""The dtypes that commands compute in (``--dtype``), and which of them a device supports."""

from __future__ import annotations

import torch

from backbones.common.errors import CommandError
from backbones.common.messages import shown
from ops.cpu import policy
from ops.cpu.gemm.int8 import not_faster_in_int8

COMPUTED = {
    **{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
    "int8": torch.int8,
}


def check_dtype(computed: str, device: torch.device) -> None:
    """Reject a dtype that the device does not support, or that is not faster than float32."""
    if computed not in COMPUTED:
        raise CommandError(f"--dtype must be {', '.join(COMPUTED)}, not {shown(computed)}")
    if device.type != "cpu":
        if computed == "int8":
            raise CommandError(
                "--dtype int8 is for CPUs; GPUs support float16, bfloat16 or float32"
            )
        return
    if computed == "float16":
        raise CommandError("--dtype float16 is for GPUs; CPUs support int8, bfloat16 or float32")
    if computed == "bfloat16" and not policy.multiplies(torch.bfloat16):
        raise CommandError(
            "--dtype bfloat16: this CPU has no bfloat16 instructions (AMX, AVX512-BF16), so "
            "float32 is faster; leave the option out"
        )
    if computed == "int8" and (reason := not_faster_in_int8(device)) is not None:
        raise CommandError(f"--dtype int8: {reason}; leave the option out")
