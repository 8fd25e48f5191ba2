"""``python -m backbones.cli``, where the command is not on the path."""

import sys

from backbones.cli.main import main

sys.exit(main())
