"""Each option of each command: values that it takes, and others that it refuses in one line.

Models are tiny, and what takes long (tracing, measuring) is left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from embedding_runs import tiny_checkpoint
from PIL import Image

import backbones
from backbones.cli import benchmark, export, graphs, parity, summary, validate, verify
from backbones.cli.doctor import Finding
from backbones.cli.main import COMMANDS, main
from backbones.common.figures import new_figure, save_figure
from backbones.common.files import write_atomically
from backbones.core import loaded
from backbones.embedding import embed

TINY_HAT = {"dim": 8, "depths": [1], "num_heads": [2], "compress_ratio": 2, "squeeze_factor": 4}
TINY_HAT["head_width"] = 8

# Words that no option for a number, a file to read, a file to write or a device takes.
NO_NUMBER = ["", "x", "nan", "1e3", "0x10", "²", "1 2", "9" * 5000, "-", "\udcff"]
BELOW_ONE = [*NO_NUMBER, "0", "-1", "-9999999999999999999999"]
NO_THREADS = [*BELOW_ONE, "100000", "9999999999999999999999"]
NO_FILE = ["", "{0}/none", "{0}/none/none", "x" * 300, "{0}/loop"]
NO_TEXT = [*NO_FILE, "{0}/photos/0.png", "{0}/photos"]
NO_TARGET = ["", "{0}", "{0}/photos", "{0}/none/a", "{0}/text.txt/a", "{0}/best.safetensors"]
NO_DEVICE = ["", "x", "meta", "cuda:99", "cpu:-1", "xla", "\udcff"]
NO_YAML = ["[", "{a: [", "5", "[1, 2]", "{dim: -5}", "{nonsense: 1}", "{1: 2}", "[" * 3000]


@dataclass(frozen=True)
class Option:
    """A flag, or a positional word (""), with values that it takes and others that it refuses.

    ``{0}`` is the folder, ``{1}`` the command. A flag of the value ``NO_VALUE`` stands alone.
    """

    flag: str
    good: list[str]
    bad: list[str]
    required: bool = False


NO_VALUE = "\0"
NO_TABLE = [*NO_FILE, "{0}/photos", "{0}/text.txt"]
# What must not be overwritten whatever the ending, also with --overwrite.
HELD = ["{0}/images/00000.png", "{0}/link.png", "{0}/link.html", "{0}/link.json", "{0}/x.xyz"]
HELD += ["{0}/table/metadata.json", "{0}/table/corrupt.txt", "{0}/table/shards/part-00000.parquet"]
HELD += ["{0}/table/none.png/a", "{0}/loop", "{0}/linked/00001.png", "{0}/classes.csv.txt"]

RESULTS = [
    Option("--out", ["{0}/{1}.png", "/dev/null"], [*NO_TARGET, *HELD], required=True),
    Option("--html", ["{0}/{1}.html", "/dev/null"], [*NO_TARGET, *HELD]),
    Option("--json", ["{0}/{1}.json", "/dev/null"], [*NO_TARGET, *HELD]),
    Option("--overwrite", [NO_VALUE], []),
    Option("--source", ["{0}/images"], [""]),
]
ROWS = Option("--csv", ["{0}/{1}.csv", "/dev/null"], [*NO_TARGET, *HELD])
RESTORER = [
    Option("--model", ["hat_nano_x2"], ["", "van_b0", "x", "hat_nano_x9"], required=True),
    Option("--checkpoint", ["{0}/hat.pt"], [*NO_FILE, "{0}/text.txt", "{0}/photos/0.png"], True),
    Option("--model-args", [json.dumps(TINY_HAT)], NO_YAML, True),
    Option("--max-memory", ["64G", "99999"], [*BELOW_ONE, "5X", "9" * 400 + "G"]),
    Option("--device", ["cpu"], NO_DEVICE),
    Option("--threads", ["1", "2"], NO_THREADS),
]
OPTIONS: dict[str, list[Option]] = {
    "predict": [
        Option("", ["{0}/photos", "{0}/photos/0.png"], NO_FILE[:-1], required=True),
        Option("--checkpoint", ["{0}/best.safetensors"], [*NO_FILE, "{0}/text.txt"], True),
        Option("--model", ["shvit_s1"], ["", "x", "hat_s_x2", "shvit_s1.nonsense"]),
        Option("--labels", ["{0}/labels.txt", "{0}/labels.json"], [*NO_TEXT, "{0}/text.txt"]),
        Option("--topk", ["1", "3", "99999999999"], BELOW_ONE),
        Option("--csv", ["{0}/{1}.csv", "/dev/null"], [*NO_TARGET, "{0}/photos/0.png"]),
        Option("--json", ["{0}/{1}.json", "/dev/null"], [*NO_TARGET, "{0}/labels.txt"]),
        Option("--overwrite", [NO_VALUE], []),
        Option("--batch-size", ["1", "99999999999"], BELOW_ONE),
        Option("--device", ["cpu", "cpu:0"], NO_DEVICE),
    ],
    "embed": [
        Option(
            "",
            ["{0}/photos"],
            [*NO_FILE, "{0}/empty", "{0}/mixed", "{0}/m*/*", "{0}/text.txt/a", "{0}/photos/0.png"],
            required=True,
        ),
        Option("--out", ["{0}/a"], ["", "{0}/photos/a", "{0}/text.txt", "{0}/other"], True),
        Option(
            "--checkpoint",
            ["{0}/best.safetensors"],
            [*NO_FILE, "{0}/text.txt", "{0}/photos", "{0}/other/shvit.pth"],
            required=True,
        ),
        Option("--model", ["shvit_s1"], ["", "x", "van_b0", "../../etc/passwd", "shvit_s1.x"]),
        Option("--features", ["head"], ["", "x", "stage:9", "stage:-1", "stage:²", "stage:0:maps"]),
        Option("--store", ["float32"], ["", "x", "int8"]),
        Option("--split", ["train", "", "x"], []),
        Option("--column", ["x", ""], []),
        Option("--batch-size", ["1", "3"], BELOW_ONE),
        Option("--decoders", ["0", "1"], [*NO_NUMBER, "-1", "1025"]),
        Option("--device", ["cpu"], NO_DEVICE),
        Option("--engine", ["local"], ["", "x"]),
        # Those of the first call, which others resume.
        Option("--classes", ["0"], ["", "x", "-1", "1.5"]),
        Option("--dtype", ["float32"], ["", "x"]),
        Option("--rows", ["1024"], BELOW_ONE),
        Option("--workers", ["1"], BELOW_ONE),
    ],
    "search": [
        Option("", ["{0}/table"], NO_TABLE, required=True),
        Option("--key", ["00001.png"], ["x", "\udcff", "../text.txt", "{0}/text.txt"], True),
        Option(
            "--query", ["{0}/photos/0.png", "{0}/photos", "{0}/loop"], [*NO_FILE[:-1], "{0}/empty"]
        ),
        Option("--top", ["1", "3", "99999999999"], BELOW_ONE),
        Option("--index", ["auto", "exact"], ["", "x"]),
        Option("--checkpoint", ["{0}/best.safetensors"], [""]),
        *RESULTS,
        ROWS,
    ],
    "duplicates": [
        Option("", ["{0}/table"], NO_TABLE, required=True),
        Option("--threshold", ["1", "0.5"], ["", "x", "nan", "inf", "0", "-1", "1.01"]),
        Option("--index", ["auto", "exact"], ["", "x"]),
        *RESULTS,
        ROWS,
    ],
    "probe": [
        Option("", ["{0}/table"], NO_TABLE, required=True),
        Option("--labels", ["{0}/classes.csv"], ["", "{0}/none", "{0}/photos", "source"], True),
        Option("--test", ["{0}/table"], NO_TABLE),
        Option("--test-labels", [], ["", "x"]),
        Option("--split", [], ["", "folder", "{0}/none"]),
        Option("--held-out", ["0.5"], ["", "x", "nan", "0", "-1", "1"]),
        Option("--neighbors", ["1", "99999999999"], BELOW_ONE),
        Option("--c", ["1", "1e-3"], ["", "x", "nan", "inf", "0", "-1"]),
        Option("--most-rows", ["4", "99999999999"], [*BELOW_ONE, "1"]),
        Option("--seed", ["0", "4294967295"], [*NO_NUMBER, "-1", "4294967296"]),
        *RESULTS,
    ],
    "summary": [
        Option("", ["shvit_s1", "van_b0"], ["", "x", "van_b9", "\udcff", "--"], required=True),
        Option("--size", ["32", "1", "65535"], [*BELOW_ONE, "65536", "9" * 30]),
        Option("--runs", ["0"], [*NO_NUMBER, "-1"], True),
        Option("--batch", [], BELOW_ONE),
        Option("--dtype", [], ["", "x", "float16"]),
        Option("--plot", [], NO_TARGET),
    ],
    "export": [
        Option("", ["shvit_s1"], ["", "x", "van_b9"], required=True),
        Option(
            "--out",
            ["{0}/a.onnx", "{0}/A.ONNX"],
            [*NO_TARGET, "{0}/a.xyz", "{0}/other/shvit.pth", "{0}/link.json", "/dev/null"],
            required=True,
        ),
        Option("--format", ["onnx"], ["", "x", "ONNX", "pt2", "safetensors"]),
        Option("--checkpoint", ["{0}/other/shvit.pth"], [*NO_FILE, "{0}/text.txt"]),
        Option("--overwrite", [NO_VALUE], []),
        Option("--dynamic", [NO_VALUE], []),
        Option("--fused", [NO_VALUE], []),
        Option("--max-drop", [], ["0.1", "", "x", "nan", "0", "-1"]),
        Option("--calibration-images", ["1", "99999999999"], [*NO_NUMBER, "0", "-1"]),
        Option("--size", ["32"], [*BELOW_ONE, "65535", "9" * 30]),
        Option("--batch", ["1", "2"], BELOW_ONE),
        Option("--calibration", [], [*NO_FILE, "{0}/photos", "{0}/empty"]),
    ],
    "verify": [
        Option("", ["shvit_s1"], ["", "x", "{0}/none", "{0}/photos/0.png"], True),
        Option("--checkpoint", ["{0}/other/shvit.pth"], [*NO_FILE, "{0}/text.txt"], True),
        Option("--save-figures", ["{0}/{1}.json"], [*NO_TARGET, "{0}/other/shvit.pth"]),
        Option("--size", ["32"], [*BELOW_ONE, "65535"]),
    ],
    "doctor": [Option("--no", [], ["", "x"]), Option("", [], ["", "x", "\udcff"])],
    "build": [Option("--isa", ["portable", "all"], ["", "x", "sse2", "\udcff"])],
    "validate": [
        Option("--data", ["digits", "{0}/data"], ["", "{0}/none", "{0}/text.txt"], required=True),
        Option("--run", ["{0}"], ["", "{0}/none", "{0}/photos"], True),
        Option("--split", ["validation"], ["", "x", "\udcff"]),
        Option("--in-chans", ["3"], BELOW_ONE),
        Option("--img-size", ["32"], [*BELOW_ONE, "65536"]),
        Option("--crop-pct", ["1", "0.5"], ["", "x", "nan", "inf", "0", "-1", "50"]),
        Option("--interpolation", ["bilinear"], ["", "x"]),
        Option("--batch-size", ["1"], BELOW_ONE),
        Option("--workers", ["0"], [*NO_NUMBER, "-1", "9999"]),
        Option("--device", ["cpu"], NO_DEVICE),
        Option("--threads", ["1"], NO_THREADS),
        Option("--max-corrupt", ["0", "1"], ["", "x", "nan", "-1", "2"]),
        Option("--real-labels", [], NO_TEXT[1:]),
        Option("--list", [], NO_TEXT),
        Option("--output", ["{0}/{1}.csv", "{0}/new/a.csv"], ["", "{0}", "{0}/text.txt/a", "x"]),
        Option("--report", ["{0}/report"], ["", "{0}/text.txt"]),
    ],
    "upscale": [
        Option("", ["{0}/photos", "{0}/photos/0.png"], ["", "{0}/none*", "{0}/empty"], True),
        *RESTORER,
        Option("--out", ["{0}/out"], ["", "{0}/text.txt", "{0}/text.txt/a"], True),
        Option("--tile", ["8", "auto", "none"], [*BELOW_ONE, "12", "AUTO"]),
        Option("--overlap", ["0", "8"], [*NO_NUMBER, "-8", "5"]),
        Option("--suffix", ["", "_a", "\udcff"], ["/", "/x/y", "../a"]),
        Option("--format", ["png", "webp"], ["", "x", "gif"]),
        Option("--quality", ["1", "100"], [*BELOW_ONE, "101"]),
    ],
    "benchmark": [
        Option("--models", ["shvit_s1"], ["", "x", "van_b9"], True),
        Option("--sizes", ["32"], [*BELOW_ONE, "65536"]),
        Option("--batches", ["1", "2"], BELOW_ONE),
        Option("--threads", ["1"], NO_THREADS),
        Option("--dtypes", ["float32"], ["", "x"]),
        Option("--modes", ["eager"], ["", "x"]),
        Option("--rounds", ["1"], BELOW_ONE),
        Option("--seconds", ["0", "1.5"], ["", "x", "nan", "-1"]),
        Option("--turn-ms", ["0", "1.5"], ["", "x", "nan", "-1"]),
        Option("--against", ["timm"], ["", "no_such_package", "json", "{0}/none.py", ".x"]),
        Option("--compare", ["{0}/report.json"], [*NO_TEXT, "{0}/labels.json"]),
        Option("--output", ["{0}/bench"], ["", "{0}/text.txt/a"], True),
    ],
}


# What does not go together, or not with the model, and what is said.
REFUSED = [
    ("sumary", "no command 'sumary'; did you mean summary?"),
    ("sum\udcffmary", "no command 'sum\\udcffmary'"),
    ("summary", "the following arguments are required: model"),
    ("summary van_b0 --nonsense", "unrecognized arguments: --nonsense"),
    ("summary van_b9", "unknown model 'van_b9'; did you mean 'van_b"),
    ("summary nonsense", "unknown model 'nonsense'; backbones.list_models() lists all"),
    ("summary van_b0 --size 1 2 3", "--size must be one side"),
    *((f"summary van_b0 {w}", "requires --kernels") for w in ("--plain", "--json", "--batch 2")),
    ("summary van_b0 --plot x.png", "--plot requires --kernels"),
    ("summary van_b0 --kernels --plain --fused", "--plain and --fused are mutually exclusive"),
    ("summary van_b0 --kernels --plain --plot x.png", "--plain and --plot are mutually exclusive"),
    ("predict none.png --model van_b0", "no image at none.png"),
    ("predict photos/0.png", "give --model NAME"),
    ("predict photos --model hat_s_x2", "hat_s_x2 has no classifier"),
    ("{p} --csv a.txt --json a.txt", "--csv and --json are both"),
    ("{p} --json a.txt --cam ./a.txt", "--json and --cam are both"),
    ("{p} --dtype int8 --cam a.png", "--cam needs the layers before fuse()"),
    ("{p} --dtype float16", "--dtype float16 is for GPUs"),
    ("{p} --cam best.safetensors", "would overwrite"),
    ("{p} --labels labels.json --json labels.json --overwrite", "would overwrite"),
    ("{p} --labels photos/0.png", "is not UTF-8 text"),
    ("{p} --labels two.txt", "two.txt names 2 classes, but the model has 3"),
    ("{p} --labels four.json", "four.json names 4 classes, but the model has 3"),
    *((f"{{p}} --labels {name}.json", "is not a JSON list of names") for name in ("text", "deep")),
    ("search table", "give --query IMAGE, or the --key"),
    ("search images --key x", "contains no embeddings: there is no metadata.json"),
    ("search table --key x", "no image with the key 'x'; its keys look like '0000"),
    ("search table --query photos/0.png --checkpoint x.pth", "as --checkpoint"),
    ("search table --query photos/0.png --out photos/0.png", "would overwrite"),
    ("search table --key x --html a --csv a", "--html and --csv"),
    ("duplicates table --csv table/shards/part-00000.parquet", "would overwrite"),
    ("probe table", "the following arguments are required: --labels"),
    ("probe table --labels source", "come from a folder, which has no classes"),
    ("probe table --labels folder --split folder --test table", "give either --test or --split"),
    ("probe table --labels folder --test-labels folder", "--test FOLDER"),
    ("{e} --int8 --out x.onnx", "--int8 needs --calibration FOLDER; give a folder of"),
    ("{e} --int8 --calibration empty --out x.onnx", "no images in empty; give a folder of"),
    ("{e} --int8 --calibration no --out x.onnx", "no image at no; give a folder of"),
    ("{e} --calibration photos --out x.onnx", "--calibration requires --int8"),
    ("{e} --int8 --out x.pt2", "--int8 requires ONNX or safetensors"),
    ("{e} --out x.safetensors", "safetensors are only for --int8"),
    ("{e} --max-drop 0.1 --out x.onnx", "--max-drop needs safetensors"),
    ("{e} --int8 --dynamic --out x.safetensors", "omit --dynamic"),
    ("{e} --int8 --batch 2 --out x.safetensors", "omit --batch"),
    ("{e} --int8 --fused --out x.safetensors", "omit --fused"),
    ("{e} --size 64 --batch 9999999999 --out x.pt2", "reduce --size or --batch"),
    ("{e} --checkpoint no.pth --out x.pt2", "no checkpoint at no.pth"),
    (f"{{e}} --out {'a' * 300}.pt2", "File name too long"),
    ("{e} --out file", "--out file must end in .onnx"),
    ("{e} --format pt2 --out x.onnx", "--out x.onnx must end in .pt2"),
    ("{e} --checkpoint w.onnx --out w.onnx", "would overwrite w.onnx, an input"),
    ("{e} --out link.pt2", "w.onnx, to which it is a link, does not"),
    ("{e} --out w.onnx", "w.onnx exists and is not an earlier result"),
    ("{e} --int8 --out best.safetensors", "best.safetensors exists and is not an earlier"),
    *((f"{{e}} --out a\udcff.{end}", "is not UTF-8, which the") for end in ("pt2", "onnx")),
    ("{e} --int8 --out a\udcff.safetensors", "is not UTF-8, which the libraries"),
    ("verify", "give a MODEL"),
    ("{v} --save-figures other/shvit.pth", "would overwrite"),
    ("{v} --figures photos/0.png", "is not UTF-8 text"),
    ("{v} --figures labels.txt", "is not JSON"),
    ("{v} --figures labels.json", "was not written by --save-figures"),
    ("{v} --figures none.json", "cannot"),
    ("validate --data digits", "no model: give --model"),
    ("validate --data digits --model nothing_*", "no model with published weights matches"),
    ("{d} van_b1 --checkpoint=x", "requires one model, not 2"),
    ("{d} --corrupt rain", "unknown corruption 'rain'"),
    ("{d} --severity 9 --corrupt", "severity 9"),
    ("{d} --severity=x", "invalid int value: 'x'"),
    ("{d} --split=holdout", "holdout"),
    ("benchmark --models van_b9", "unknown models van_b9; see backbones.list_models()"),
    ("benchmark --compare no.json", "--compare: there is no file no.json"),
]
SHORT = {
    "{p}": "predict photos --checkpoint best.safetensors",
    "{e}": "export shvit_s1",
    "{v}": "verify --checkpoint other/shvit.pth",
    "{d}": "validate --data digits --model van_b0",
}


@pytest.mark.parametrize(("line", "told"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_does_not_go_together_is_refused_in_a_line(line, told, folder, monkeypatch):
    _without_measuring(monkeypatch)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    command, *words = [word for part in line.split() for word in SHORT.get(part, part).split()]
    status, said = run(command, words)
    last = said.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and said.count("error: ") == 1
    assert told in last
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that good words name, in the current folder; what takes long does nothing."""
    folder = tmp_path_factory.mktemp("words")
    tiny_checkpoint(folder, classes=3)
    (folder / "other").mkdir()  # where no recipe lies beside it
    whole = parity.checkpoint(parity.reference("shvit", "shvit_s1"))
    torch.save({"model": whole}, folder / "other" / "shvit.pth")
    hat = backbones.create_model("hat_nano_x2", **TINY_HAT)
    torch.save(hat.state_dict(), folder / "hat.pt")
    (folder / "text.txt").write_text("{}\n")
    (folder / "labels.txt").write_text("a\nb\nc\n")
    (folder / "labels.json").write_text('["a", "b", "c"]')
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "four.json").write_text('["a", "b", "c", "d"]')
    (folder / "text.json").write_text('"abc"')
    (folder / "deep.json").write_text("[" * 10**5)
    (folder / "w.onnx").write_bytes(b"weights")
    (folder / "link.pt2").symlink_to("w.onnx")
    (folder / "report.json").write_text('{"machine": {}, "results": []}')
    (folder / "classes.csv").write_text("".join(f"0000{i}.png,{'abab'[i]}\n" for i in range(4)))
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()
    pixels = np.random.RandomState(0).randint(0, 255, (4, 9, 8, 3)).astype(np.uint8)
    for place in ("photos", "data/validation/a", "data/validation/b", "data/validation/c"):
        (folder / place).mkdir(parents=True)
        for number, image in enumerate(pixels[:2]):
            Image.fromarray(image).save(folder / place / f"{number}.png")
    (folder / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{number:05}.png")
    embed(folder / "images", folder / "table", checkpoint=folder / "best.safetensors", workers=1)
    (folder / "linked").symlink_to("images")
    (folder / "link.png").symlink_to("images/00000.png")
    (folder / "link.html").symlink_to("best.safetensors")
    (folder / "link.json").symlink_to("table/metadata.json")
    shutil.copytree(folder / "images", folder / "mixed")
    (folder / "mixed" / "a.tar").touch()
    before = Path.cwd()
    threads = torch.get_num_threads()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        _leave_out_what_takes_long(patch)
        yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


def _leave_out_what_takes_long(patch: pytest.MonkeyPatch) -> None:
    made = backbones.create_model

    def on_meta(name: str, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return made(name, **kwargs)

    patch.setattr(summary, "create", _errors_as(loaded.create, on_meta))
    patch.setattr(verify, "create", _errors_as(loaded.create, on_meta))
    patch.setattr(summary, "describe", lambda *args: "a table\n")
    patch.setattr(verify, "_verify_code", lambda name: True)
    patch.setattr(export, "export", lambda *args: None)
    patch.setattr(graphs, "require_onnx", lambda: None)
    save_figure(new_figure(1, 1), Path("figure"))
    drawn = Path("figure").read_bytes()
    for command in ("search", "duplicates"):
        patch.setattr(f"backbones.cli.{command}.draw_sheet", _draw(drawn))
    patch.setattr("backbones.cli.probe.draw_confusions", _draw(drawn))
    patch.setattr("ops.cpu.prepare", lambda isa: Path("\udcff"))
    patch.setattr("backbones.cli.doctor.examine", lambda: [Finding("x", "ok", "─ ✓ \udcff")])


def _draw(picture: bytes) -> Callable[..., None]:
    return lambda path, *args: write_atomically(path, lambda file: file.write(picture))


def _errors_as(create: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`backbones.core.loaded.create` with another way to make the model."""

    def call(name: str, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbones, "create_model", instead)
            return create(name, **kwargs)

    return call


def _without_measuring(patch: pytest.MonkeyPatch) -> None:
    row = {"checkpoint": "x", "top1": 50.0, "top5": 100.0, "images": 6}
    measured = lambda self, candidate: {"model": candidate.name, **row}  # noqa: E731
    patch.setattr(validate.Validator, "measure", measured)
    patch.setattr(benchmark, "measure", lambda row, *args: {**row.key, "contenders": {}})
    patch.setattr(benchmark, "table", lambda report: "")
    # A second with all that tests import.
    patch.setattr(benchmark, "gc", SimpleNamespace(collect=lambda: 0))
    patch.setattr(benchmark, "draw", lambda report, file: None)


def run(command: str, words: list[str]) -> tuple[int, str]:
    """Status and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([command, *words])
    return status, err.getvalue()


def held(folder: Path) -> dict[str, bytes]:
    """What words only read: all files of the beginning, and links."""
    names = ("best.safetensors", "config.yaml", "hat.pt", "text.txt", "labels.txt", "labels.json")
    names += ("report.json", "classes.csv", "link.png", "link.html", "link.json")
    folders = ("photos", "images", "data", "mixed", "other", "table")
    below = (path for name in folders for path in (folder / name).rglob("*"))
    paths = [*(folder / name for name in names), *below]
    return {str(p): p.read_bytes() for p in paths if p.is_file() and p.name not in _PICTURES}


_PICTURES = ("search.png", "duplicates.png", "confusion.png")  # drawn where no --out is given


def _placed(words: list[str], command: str, folder: Path) -> list[str]:
    return [word.replace("{0}", str(folder)).replace("{1}", command) for word in words]


def _fits(option: Option) -> list[str]:
    return [option.good[0]] if not option.flag else [f"{option.flag}={option.good[0]}"]


def _is_quick(option: Option, value: str) -> bool:
    """Whether it is refused before anything is read."""
    quick = option.flag and {"x", "nan"} & {*option.bad} and "{0}" not in "".join(option.bad)
    return bool(quick or not value or value in HELD)


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_cannot_be_is_refused_in_a_line(command, quick, folder, monkeypatch):
    """Each value in turn, among options that are right; nothing is changed."""
    _without_measuring(monkeypatch)
    needed, before = [o for o in OPTIONS[command] if o.required], held(folder)
    for option in OPTIONS[command]:
        words = [word for other in needed if other is not option for word in _fits(other)]
        for value in (bad for bad in option.bad if _is_quick(option, bad) is quick):
            (word,) = _placed([value], command, folder)
            given = f"{option.flag}={word}" if option.flag else word
            status, said = run(command, [*_placed(words, command, folder), given])
            told = [line for line in said.splitlines() if line.startswith("error: ")]
            assert status == 2 and said.endswith(f"{told[0]}\n") and len(told) == 1, given
            assert "Traceback" not in said and len(told[0]) < 2000, given
            parts = re.findall("[a-z]+|[0-9]+", value.replace("{0}", "").lower())
            named = [option.flag.strip("-"), repr(value)[1:-1], *parts]
            assert any(part in said.lower() for part in named), given
    assert held(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_can_be_is_done(command, folder, monkeypatch):
    """Each value in turn; what is read stays as it is."""
    _without_measuring(monkeypatch)
    needed, before = [o for o in OPTIONS[command] if o.required], held(folder)
    for option in OPTIONS[command]:
        words = [word for other in needed if other is not option for word in _fits(other)]
        for value in option.good:
            given = f"{option.flag}={value}" if option.flag else value
            given = option.flag if value == NO_VALUE else given
            status, said = run(command, _placed([*words, given], command, folder))
            assert status in (0, 1) and "Traceback" not in said, (given, said)
    assert held(folder) == before
