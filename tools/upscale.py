"""Restore or enlarge pictures: files, folders and globs, into a folder.

    python tools/upscale.py photos/ --model hat_x4 --checkpoint HAT_SRx4.pth --out enlarged
    python tools/upscale.py 'scans/*.tif' --model hat_x2 --checkpoint HAT_SRx2.pth --out enlarged \\
        --max-memory 2G --tta --compare

PNG, JPEG, WebP, TIFF and BMP, with alpha, palette, grey, 16 bits and the camera's orientation. A
picture that cannot be read is reported and the rest go on; the exit status is then 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones.restoration.upscale_files import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(description=__doc__ or ""))
