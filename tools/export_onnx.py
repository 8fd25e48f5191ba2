"""Models as ONNX files: `vision-backbones export` as a script.

python tools/export_onnx.py van_b0 --dynamic --out van.onnx
"""

from __future__ import annotations

import sys

from backbones.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("export", program="python tools/export_onnx.py"))
