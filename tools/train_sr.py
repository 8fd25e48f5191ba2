"""Train a restoration model: super-resolution, denoising, JPEG artifacts, real photographs.

    python tools/train_sr.py --config configs/sr/quickstart.yaml
    python tools/train_sr.py --config configs/sr/hat.yaml --model hat_x2 \\
        --train-pictures DF2K/HR --val-pictures Set5/HR
    torchrun --nproc-per-node 8 tools/train_sr.py --config …

Every key of the recipe is a flag; ``--print-config`` prints the resolved recipe. Results go to
``OUTPUT/NAME/``: ``best.safetensors``, ``last.pt`` (the state for resuming), ``summary.csv``,
``metrics.jsonl``, ``comparison.png``, ``config.yaml``. ``--resume auto`` continues after a crash.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones.common.console import guard  # noqa: E402
from backbones.restoration.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(guard(lambda: main(description=__doc__ or "")))
