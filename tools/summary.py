"""What every stage of a model costs: `vision-backbones summary` as a script.

python tools/summary.py van_b0
"""

from __future__ import annotations

import sys

from backbones.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("summary", program="python tools/summary.py"))
