"""What the server of :class:`training_runs.Run` does once: import the library and train a little.

Processes forked afterwards have torch's kernels compiled and its modules loaded. A run's results
do not depend on it, since each seeds all generators.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from training_runs import make_images, train

with tempfile.TemporaryDirectory() as _folder, redirect_stdout(io.StringIO()):
    _images = make_images(Path(_folder) / "images", {"train": 8, "val": 3})
    # With one thread: others would not survive a fork.
    train(f"--data={_images}", f"--output={_folder}", "--epochs=1", "--ema", "--clip-grad=1")
