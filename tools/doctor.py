"""What is missing or clashes here: `vision-backbones doctor` as a script.

python tools/doctor.py
"""

from __future__ import annotations

import sys

from backbones.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("doctor", program="python tools/doctor.py"))
