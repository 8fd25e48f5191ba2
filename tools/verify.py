"""What a checkpoint is: `vision-backbones verify` as a script.

python tools/verify.py van_b0 --checkpoint van_b0.pth
"""

from __future__ import annotations

import sys

from backbones.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("verify", program="python tools/verify.py"))
