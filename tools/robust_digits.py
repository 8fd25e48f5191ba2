"""Measure the robustness of robust token attention to noise; writes ``docs/robustness.json``.

    python tools/robust_digits.py     # six short trainings, each validated on noisy digits

Token-aware average pooling and attention diversification (https://arxiv.org/abs/2303.11126) on the
digits of ``configs/cls/bench_digits.yaml``, with three seeds each. ``tools/learning_page.py`` adds
the results to the learning page. Each result is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import processor_name

from backbones.common.files import write_text_atomically

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "cls" / "bench_digits.yaml"
RESULTS = ROOT / "docs" / "robustness.json"
MODEL, DEPTHS, SIDE = "favit_b0", [1, 1, 2, 1], 32
EPOCHS, SEEDS, SEVERITIES = 2, (0, 1, 2), (1, 3, 5)
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")
KINDS: Mapping[str, tuple[dict[str, Any], Sequence[str]]] = {
    "as published": ({}, ()),
    "with both": ({"token_pooling": 4}, ("--attn-diversity", "1")),
}
SECTION = """
## Robust token attention

Token-aware average pooling (`token_pooling=4`) and attention diversification (`attn_diversity: 1`)
of [2303.11126](https://arxiv.org/abs/2303.11126), measured by `python tools/robust_digits.py`:
`{model}` with depths {depths} on the digits above at {side}×{side}, with {epochs} epochs of their
recipe. Top-1 in %, mean and range of {seeds} seeds; noise is that of `imagecorruptions` with
severities {severities}, of which training sees none. One of the 355 images is worth 0.3 %; smaller
differences mean nothing.

| | clean | {noises} | all noise |
|---|{rules}---:|---:|
"""


def run(command: Sequence[Any]) -> None:
    """Run a script of this folder's parent on one thread.

    Raises:
        SystemExit: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if status := subprocess.run([sys.executable, *map(str, command)], env=environment).returncode:
        raise SystemExit(f"{command[0]} ended with status {status}")


def measure(kind: str, seed: int, folder: Path) -> dict[str, float]:
    """Train a network; return its top-1 per noise (mean over severities) and on clean digits."""
    arguments, flags = KINDS[kind]
    model_args = json.dumps({"depths": DEPTHS, **arguments})
    train = [ROOT / "train_cls.py", "--config", CONFIG, "--model", MODEL, "--seed", seed]
    train += ["--img-size", SIDE, "--epochs", EPOCHS, "--model-args", model_args, *flags]
    run([*train, "--output", folder, "--name", "run"])
    table = folder / "validation.csv"
    validate = [ROOT / "tools" / "validate.py", "--data", "digits", "--run", folder / "run"]
    validate += ["--workers", 0, "--corrupt", *NOISES, "--severity", *SEVERITIES]
    run([*validate, "--output", table])
    (clean,) = csv.DictReader(table.read_text().splitlines())
    rows = list(csv.DictReader(table.with_suffix(".corruptions.csv").read_text().splitlines()))
    found = {"clean": float(clean["top1"])}
    for noise in NOISES:
        scores = [float(row["top1"]) for row in rows if row["corruption"] == noise]
        found[noise] = round(statistics.fmean(scores), 3)
    found["all noise"] = round(statistics.fmean(found[noise] for noise in NOISES), 3)
    return found


def section(report: dict[str, Any]) -> str:
    """The section of the learning page."""
    columns = ["clean", *NOISES, "all noise"]
    text = SECTION.format(
        model=report["model"],
        depths=", ".join(map(str, report["depths"])),
        side=SIDE,
        epochs=EPOCHS,
        seeds=len(SEEDS),
        severities=", ".join(map(str, SEVERITIES)),
        noises=" | ".join(noise.replace("_", " ") for noise in NOISES),
        rules="---:|" * len(NOISES),
    )
    for kind, seeds in report["results"].items():
        cells = []
        for column in columns:
            values = [seed[column] for seed in seeds.values()]
            low, high = min(values), max(values)
            cells.append(f"{statistics.fmean(values):.1f} ({low:.1f}–{high:.1f})")
        text += f"| {kind} | {' | '.join(cells)} |\n"
    return f"{text}\nTrained with {report['machine']}.\n"


def main() -> None:
    """Measure all missing results."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    report: dict[str, Any] = {"model": MODEL, "depths": DEPTHS, "results": {}}
    if RESULTS.exists():
        report = json.loads(RESULTS.read_text())
    report["machine"] = f"torch {torch.__version__} on {processor_name()}, one thread"
    for seed in SEEDS:
        for kind in KINDS:
            results = report["results"].setdefault(kind, {})
            if str(seed) not in results:
                with tempfile.TemporaryDirectory() as folder:
                    results[str(seed)] = measure(kind, seed, Path(folder))
                write_text_atomically(RESULTS, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
