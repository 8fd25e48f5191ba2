"""Values that options refuse, and words that do not go together, are refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding_runs import tiny_checkpoint
from PIL import Image

import backbones
from backbones.cli import parity
from backbones.cli.main import COMMANDS, main
from backbones.embedding import embed

TINY_HAT = {"dim": 8, "depths": [1], "num_heads": [2], "compress_ratio": 2, "squeeze_factor": 4}
TINY_HAT["head_width"] = 8
_HAT = f"--model-args={json.dumps(TINY_HAT, separators=(',', ':'))}"
# Each command with what it needs; ``{0}`` is the folder.
RIGHT = {
    "predict": "{0}/photos --checkpoint={0}/best.safetensors",
    "embed": "{0}/photos --checkpoint={0}/best.safetensors --out={0}/a --workers=1",
    "search": "{0}/table --key=00001.png --out={0}/search.png",
    "duplicates": "{0}/table --out={0}/duplicates.png",
    "probe": "{0}/table --labels={0}/classes.csv --out={0}/probe.png",
    "summary": "shvit_s1 --runs=0",
    "export": "shvit_s1 --out={0}/a.onnx",
    "verify": "shvit_s1 --checkpoint={0}/other/shvit.pth",
    "doctor": "",
    "build": "",
    "validate": "--data=digits --run={0}",
    "upscale": f"{{0}}/photos --model=hat_nano_x2 --checkpoint={{0}}/hat.pt {_HAT} --out={{0}}/out",
    "benchmark": "--models=shvit_s1 --output={0}/bench",
}

# Words that no option for a number, a file to read, a file to write or a device takes.
NO_NUMBER = ["", "x", "nan", "1e3", "0x10", "²", "1 2", "9" * 5000, "-", "\udcff"]
BELOW_ONE = [*NO_NUMBER, "0", "-1", "-9999999999999999999999"]
NO_FILE = ["", "{0}/none", "{0}/none/none", "x" * 300, "{0}/loop"]
NO_TEXT = [*NO_FILE, "{0}/photos/0.png", "{0}/photos"]
NO_TARGET = ["", "{0}", "{0}/photos", "{0}/none/a", "{0}/text.txt/a", "{0}/best.safetensors"]
# What must not be overwritten whatever the ending, also with --overwrite.
HELD = ["{0}/images/00000.png", "{0}/link.png", "{0}/link.html", "{0}/link.json", "{0}/x.xyz"]
HELD += ["{0}/table/metadata.json", "{0}/table/corrupt.txt", "{0}/table/shards/part-00000.parquet"]
HELD += ["{0}/table/none.png/a", "{0}/loop", "{0}/linked/00001.png", "{0}/classes.csv.txt"]

# Commands and options, "-" for a word without one, and what these refuse.
BAD: list[tuple[str, list[str]]] = [
    ("predict --topk --batch-size, embed --batch-size --rows --workers, search --top", BELOW_ONE),
    ("probe --neighbors --most-rows, summary --batch, export --batch, upscale --tile", BELOW_ONE),
    ("validate --in-chans --batch-size, benchmark --batches --rounds", BELOW_ONE),
    ("export --calibration-images, upscale --max-memory --quality", BELOW_ONE),
    ("summary --size, export --size", [*BELOW_ONE, "65536", "9" * 30]),
    ("validate --img-size, benchmark --sizes", [*BELOW_ONE, "65536"]),
    ("validate --threads, upscale --threads, benchmark --threads", [*BELOW_ONE, "100000"]),
    ("embed --decoders, probe --seed, validate --workers", [*NO_NUMBER, "-1", "4294967296"]),
    ("summary --runs, upscale --overlap", [*NO_NUMBER, "-1"]),
    ("probe --most-rows", ["1"]),
    ("upscale --tile", ["12", "AUTO"]),
    ("upscale --overlap", ["5"]),
    ("upscale --quality", ["101"]),
    ("upscale --max-memory", ["5X", "9" * 400 + "G"]),
    (
        "duplicates --threshold, probe --held-out --c, export --max-drop",
        ["", "x", "nan", "0", "-1"],
    ),
    ("validate --crop-pct", ["", "x", "nan", "inf", "0", "-1", "50"]),
    ("duplicates --threshold, probe --held-out, validate --max-corrupt", ["1.01", "inf"]),
    ("validate --max-corrupt, benchmark --seconds --turn-ms", ["", "x", "nan", "-1"]),
    ("export --max-drop", ["0.1"]),
    (
        "predict --device, embed --device, validate --device, upscale --device",
        ["", "x", "meta", "cuda:99", "cpu:-1", "xla", "\udcff"],
    ),
    ("predict --model, embed --model, upscale --model, summary -, export -, verify -", ["", "x"]),
    ("embed --store --engine --dtype --classes, search --index, duplicates --index", ["", "x"]),
    ("summary --dtype, export --format, validate --split --interpolation", ["", "x"]),
    ("benchmark --models --dtypes --modes --against, upscale --format, doctor --no -", ["", "x"]),
    ("predict --model, embed --model", ["hat_s_x2", "shvit_s1.nonsense", "../../etc/passwd"]),
    ("upscale --model", ["van_b0", "hat_nano_x9"]),
    ("embed --store", ["int8"]),
    ("embed --classes", ["-1", "1.5"]),
    ("embed --features", ["", "x", "stage:9", "stage:-1", "stage:²", "stage:0:maps"]),
    ("build --isa, summary -", ["x", "sse2", "\udcff"]),
    ("benchmark --against", ["no_such_package", "json", "{0}/none.py", ".x"]),
    (
        "upscale --model-args",
        ["[", "{a: [", "5", "[1, 2]", "{dim: -5}", "{nonsense: 1}", "{1: 2}", "[" * 3000],
    ),
    ("upscale --suffix", ["/", "/x/y", "../a"]),
    ("search --key", ["x", "\udcff", "../text.txt", "{0}/text.txt"]),
    ("search --source --checkpoint, duplicates --source, probe --source --split", [""]),
    ("predict -, search --query", NO_FILE[:-1]),
    ("embed -", [*NO_FILE, "{0}/empty", "{0}/mixed", "{0}/m*/*", "{0}/photos/0.png"]),
    ("upscale -", ["", "{0}/none*", "{0}/empty"]),
    ("search -, duplicates -, probe - --test", [*NO_FILE, "{0}/photos", "{0}/text.txt"]),
    ("probe --labels --split", ["", "{0}/none"]),
    ("probe --labels", ["source", "{0}/photos"]),
    ("probe --split", ["folder"]),
    ("probe --test-labels", ["x"]),
    ("predict --checkpoint, embed --checkpoint", [*NO_FILE, "{0}/text.txt", "{0}/photos"]),
    ("export --checkpoint, verify --checkpoint, upscale --checkpoint", [*NO_FILE, "{0}/text.txt"]),
    ("predict --labels, validate --list", NO_TEXT),
    ("validate --real-labels", NO_TEXT[1:]),
    ("validate --data --run", ["", "{0}/none", "{0}/text.txt"]),
    ("export --calibration", [*NO_FILE, "{0}/photos", "{0}/empty"]),
    ("predict --csv --json, export --out, summary --plot", NO_TARGET),
    ("predict --csv", ["{0}/photos/0.png"]),
    ("predict --json", ["{0}/labels.txt"]),
    ("export --out", ["{0}/a.xyz", "{0}/other/shvit.pth", "{0}/link.json", "/dev/null"]),
    ("embed --out", ["", "{0}/photos/a", "{0}/text.txt", "{0}/other"]),
    ("upscale --out, benchmark --output", ["", "{0}/text.txt/a"]),
    ("validate --output --report", ["", "{0}/text.txt/a"]),
    ("search --out --html --json --csv", [*NO_TARGET, *HELD]),
    ("duplicates --out --html --json --csv", [*NO_TARGET, *HELD]),
    ("probe --out --html --json", [*NO_TARGET, *HELD]),
]


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
    ("duplicates table --json table/metadata.json --overwrite", "would overwrite"),
    ("probe table", "the following arguments are required: --labels"),
    ("probe table --labels source", "come from a folder, which has no classes"),
    ("probe table --labels folder --split folder --test table", "give either --test or --split"),
    ("probe table --labels folder --test-labels folder", "--test FOLDER"),
    ("{e} --int8 --out x.onnx", "--int8 needs --calibration FOLDER; give a folder of"),
    ("{e} --int8 --calibration empty --out x.onnx", "no images in empty; give a folder of"),
    ("{e} --calibration photos --out x.onnx", "--calibration requires --int8"),
    ("{e} --int8 --out x.pt2", "--int8 requires ONNX or safetensors"),
    ("{e} --out x.safetensors", "safetensors are only for --int8"),
    ("{e} --max-drop 0.1 --out x.onnx", "--max-drop needs safetensors"),
    ("{e} --int8 --dynamic --out x.safetensors", "omit --dynamic"),
    ("{e} --int8 --batch 2 --out x.safetensors", "omit --batch"),
    ("{e} --int8 --fused --out x.safetensors", "omit --fused"),
    ("{e} --size 64 --batch 9999999999 --out x.pt2", "not enough memory: "),
    ("{e} --batch 0 --out x.pt2", "--batch must be at least 1, not 0"),
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
    ("validate --data digits", "no model: give --model"),
    ("validate --data digits --model nothing_*", "no model with published weights matches"),
    ("{d} van_b1 --checkpoint=x", "requires one model, not 2"),
    ("{d} --corrupt rain", "unknown corruption 'rain'"),
    ("{d} --severity 9 --corrupt", "severity 9"),
    ("{d} --split=holdout", "holdout"),
    ("{m} --features head:1", "--features must be head, stage:N or stage:N:map, not 'head:1'"),
    ("{m} --features stage:3", "shvit_s1 has stages 0 … 2, not 3"),
    ("{m} --classes 6", "shvit_s1 has 3 classes, fewer than the requested 6"),
    ("{m} --dtype float16", "--dtype float16 is for GPUs"),
    ("{m} --checkpoint absent.pth", "no checkpoint at absent.pth"),
    ("{m} --out photos/out", "is inside the source"),
    ("embed images --checkpoint best.safetensors --out linked/a", "is inside the source"),
    ("{m} --out other", "contains other files (shvit.pth)"),
    ("{m} --out text.txt", "text.txt is not a folder"),
    ("{u} photos/*.gif", "nothing matches"),
    ("{u} photos/0.png data/validation/a/0.png", "would both become"),
    ("{u} --out photos --suffix= photos/0.png", "would overwrite"),
    ("{u} --out photos/0.png/deeper photos", "0.png is not a folder"),
    ("{u} --suffix ../x photos", "--suffix must be part of a file's name, not "),
    ("{u} --tile 12 photos", "multiple of the model's window of 8, got 12"),
    ("upscale photos --out out --model van_b0", "van_b0 does not output images: use one"),
    ("{u} --model-args [1] photos", "--model-args must be a mapping"),
    ('{u} --model-args {"dim":-5} photos', "dim must be in 1"),
    ("upscale photos --out out --model hat_x4", "HAT_SRx4_ImageNet-pretrain.pth in http"),
    ("upscale photos --out out --model hat_x4 --checkpoint no", "no checkpoint at no"),
    ("benchmark --against no_such_package", "No module named"),
    ("benchmark --against json", "json has no function create_model"),
    ("benchmark --against none.py", "there is no file"),
    ("benchmark --models van_b9", "unknown model 'van_b9'; see backbones.list_models()"),
]
SHORT = {
    "{p}": "predict photos --checkpoint best.safetensors",
    "{e}": "export shvit_s1",
    "{m}": "embed photos --checkpoint best.safetensors --out a --workers 1",
    "{u}": f"upscale --model hat_nano_x2 --checkpoint hat.pt {_HAT} --out out",
    "{d}": "validate --data digits --model van_b0",
}


@pytest.mark.parametrize(("line", "told"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_does_not_go_together_is_refused_in_a_line(line, told, folder):
    before = contents(folder)
    command, *words = [word for part in line.split() for word in SHORT.get(part, part).split()]
    status, said = run(command, words)
    last = said.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and said.count("error: ") == 1
    assert told in last
    assert contents(folder) == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that words name, as the current folder."""
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
    os.chdir(folder)
    yield folder
    os.chdir(before)


def run(command: str, words: list[str]) -> tuple[int, str]:
    """Status and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([command, *words])
    return status, err.getvalue()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def given_to(command: str, quick: bool) -> Iterator[tuple[str, str]]:
    """Options of a command with a value that they refuse, quickly if that is before any reading."""
    for places, values in BAD:
        at_once = {"x", "nan", "1.01"} & {*values} and "{0}" not in "".join(values)
        for name, *flags in (place.split() for place in places.split(", ")):
            for flag in flags if name == command else ():
                for value in values:
                    at_start = flag != "-" and at_once or not value or value in HELD
                    if bool(at_start) is quick:
                        yield flag, value


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_cannot_be_is_refused_in_a_line(command, quick, folder):
    """Each value in turn, among words that are right."""
    before = contents(folder)
    for flag, value in given_to(command, quick):
        words = RIGHT[command].split()
        words = [w for w in words if w.split("=")[0] != flag and (flag != "-" or w[0] == "-")]
        words += [value if flag == "-" else f"{flag}={value}"]
        words = [word.replace("{0}", str(folder)) for word in words]
        status, said = run(command, words)
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and said.endswith(f"{told[0]}\n") and len(told) == 1, words
        assert "Traceback" not in said and len(told[0]) < 2000, words
        parts = re.findall("[a-z]+|[0-9]+", value.replace("{0}", "").lower())
        named = [flag.strip("-") or value, repr(value)[1:-1], *parts]
        assert any(part in said.lower() for part in named), words
    assert contents(folder) == before
