"""PSNR and SSIM of a super-resolution model on Set5, Set14, BSD100, Urban100, Manga109, …

    python tools/validate_sr.py data/Set5 data/Urban100 --model hat_x4 --checkpoint HAT_SRx4.pth \\
        --csv scores.csv

A folder contains pictures, or subfolders ``HR`` (or ``GTmod12``, …) and ``LR`` (or ``LRbicx4``,
``X4``, …); missing low-resolution pictures are made with MATLAB's bicubic kernel. As in papers,
metrics are computed on luma, without a border as wide as the scale.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones.restoration.validate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(description=__doc__ or ""))
