"""Classify images: `vision-backbones predict` as a script.

python tools/predict.py photos/ --checkpoint runs/quickstart/best.safetensors --cam cam.png
"""

from __future__ import annotations

import sys

from backbones.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("predict", program="python tools/predict.py"))
