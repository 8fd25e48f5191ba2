"""Record the outputs of models and kernels, and compare another tree with them, bit for bit.

Before a change to the engine, and after each step of it:

    python tools/record_outputs.py record before.pt
    python tools/record_outputs.py compare before.pt
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import backbones
from backbones.common.arguments import nonempty_path
from backbones.common.files import write_atomically
from backbones.common.outputs import Kind, add_overwrite, require_writable

logger = logging.getLogger("record_outputs")

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    *("biformer_tiny", "efficientvit_m5", "favit_b0", "hat_s_x2", "inception_next_tiny"),
    *("litv2_s", "medvitv2_tiny", "ravlt_t", "shvit_s4", "unireplknet_a", "unireplknet_t"),
    "van_b0",
)
DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((224, 224), (97, 130))
RESTORED_SIZES = ((48, 48), (37, 50))
CALLS = 3  # the first runs eagerly, the second is captured, the third replayed
# Tests of operators, which call kernels on inputs with fixed seeds.
OPERATOR_TESTS = ("tests/ops",)

Outputs = dict[str, Tensor]
_RECORD = Kind((".pt",), rb"PK\x03\x04.{0,200}/data.pkl")  # as torch.save writes


def model_outputs(names: tuple[str, ...] = MODELS) -> Iterator[tuple[str, Tensor]]:
    """Outputs of fused models for one and eight images, one and two threads, even and odd sizes."""
    for name in names:
        for dtype in DTYPES:
            torch.manual_seed(0)
            model = backbones.create_model(name).eval()
            backbones.fuse(model, dtype=dtype)
            even, odd = RESTORED_SIZES if name.startswith("hat") else SIZES
            for batch, threads, size in ((1, 1, even), (1, 2, odd), (8, 1, odd), (8, 2, even)):
                torch.set_num_threads(threads)
                images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
                with torch.inference_mode():
                    for call in range(CALLS):
                        out = model(images.to(dtype))
                        key = f"{name} {dtype} {batch}x{size[0]}x{size[1]} {threads}T call {call}"
                        yield key, out.float().clone()
        logger.info("%s", name)


class KernelCalls(TorchDispatchMode):
    """Records the results of our operators by a digest of their names and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: Outputs = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "vision_backbones":
            return func(*args, **kwargs)
        key = f"{func.name()} {_digest((args, kwargs))}"
        result = func(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else [result]
        if all(type(r) is Tensor and r.device.type == "cpu" for r in results):
            for i, r in enumerate(results):
                self.outputs[f"{key} {i}"] = r.detach().float().clone()
        return result


def _digest(value: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape), value.stride())).encode())
            if value.device.type == "cpu" and type(value) is Tensor:
                digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(value, list | tuple):
            for v in value:
                add(v)
        elif isinstance(value, dict):
            for k in sorted(value):
                add((k, value[k]))
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()[:24]


def kernel_outputs(tests: tuple[str, ...] = OPERATOR_TESTS) -> Outputs:
    """Outputs of every kernel for the inputs of its tests."""
    torch.set_num_threads(2)
    calls = KernelCalls()

    class Plugin:
        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_call(self) -> Iterator[None]:
            with calls:
                yield

    with tempfile.TemporaryDirectory() as cache:
        arguments = ["-q", "-p", "no:xdist", "-o", f"cache_dir={cache}", *tests]
        pytest.main([*arguments, "--tb=no", "-W", "ignore"], plugins=[Plugin()])
    return calls.outputs


def differences(before: Outputs, now: Outputs) -> list[tuple[str, float]]:
    """Outputs that are not bit-identical, with the greatest difference relative to the maximum."""
    found = []
    for key in before.keys() & now.keys():
        old, new = before[key], now[key]
        if old.shape != new.shape:
            found.append((key, float("inf")))
        elif not torch.equal(old.view(torch.int32), new.view(torch.int32)):
            scale = old.nan_to_num().abs().max().clamp_min(1e-30)
            found.append((key, float((old - new).nan_to_num().abs().max() / scale)))
    return sorted(found, key=lambda item: -item[1])


def main(argv: list[str] | None = None) -> int:
    """Record or compare; the exit status is 1 if anything differs."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=nonempty_path)
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--tests", nargs="*", default=list(OPERATOR_TESTS), metavar="PATH")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.action == "record":
        require_writable({"FILE": (args.file, _RECORD)}, overwrite=args.overwrite)
    os.chdir(ROOT)
    now = dict(model_outputs(tuple(args.models)))
    if args.tests:
        now |= kernel_outputs(tuple(args.tests))
    if args.action == "record":
        write_atomically(args.file, lambda file: torch.save(now, file))
        logger.info("%d outputs are in %s", len(now), args.file)
        return 0
    before = torch.load(args.file, weights_only=True)
    found = differences(before, now)
    for key, difference in found:
        logger.info("%-90s %.1e", key, difference)
    common = len(before.keys() & now.keys())
    logger.info("%d of %d compared, %d differ", common, len(before), len(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
