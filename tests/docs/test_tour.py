"""The notebook runs from top to bottom without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

TOUR = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"


def code(cell):
    return "".join(cell["source"]) if cell["cell_type"] == "code" else ""


# Of matplotlib, about tensors that it makes arrays of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_code_runs(capsys):
    """In this process, with a third of its training."""
    cells = json.loads(TOUR.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)  # each would change with the pictures
    text = "\n".join(map(code, cells))
    for long, short in (("%matplotlib inline", ""), ("in range(3)", "in range(1)")):
        assert text.count(long) == 1
        text = text.replace(long, short)
    plt.switch_backend("Agg")
    plt.close("all")
    exec(compile(text, str(TOUR), "exec"), {})
    assert len(plt.get_fignums()) == 3
    plt.close("all")
    assert "accuracy on 397 digits" in capsys.readouterr().out


@pytest.mark.slow
def test_tour(tmp_path):
    done = tmp_path / "tour.ipynb"
    execute = [sys.executable, "-c", "from nbclient.cli import main; main()"]
    options = [str(TOUR), f"--output={done.with_suffix('')}", "--timeout=300"]
    run = subprocess.run([*execute, *options], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    cells = json.loads(done.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "accuracy on 397 digits" in printed
