"""Record the outputs of fused models, and compare another tree with them, bit for bit.

Before a change to the engine, and after each step of it:

    python tools/record_outputs.py record before.pt
    python tools/record_outputs.py compare before.pt
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import backbones
from backbones.common.arguments import nonempty_path
from backbones.common.files import write_atomically
from backbones.common.outputs import Kind, add_overwrite, require_writable
from ops.fuse.calls import CALLS_TO_REPLAY

logger = logging.getLogger("record_outputs")

MODELS = (
    *("biformer_tiny", "efficientvit_m5", "favit_b0", "hat_s_x2", "inception_next_tiny"),
    *("litv2_s", "medvitv2_tiny", "ravlt_t", "shvit_s4", "unireplknet_a", "unireplknet_t"),
    "van_b0",
)
DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((224, 224), (97, 130))
RESTORED_SIZES = ((48, 48), (37, 50))
CALLS = CALLS_TO_REPLAY + 1  # which is replayed

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
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.action == "record":
        require_writable({"FILE": (args.file, _RECORD)}, overwrite=args.overwrite)
    now = dict(model_outputs(tuple(args.models)))
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
