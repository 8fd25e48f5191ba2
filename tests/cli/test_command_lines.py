"""Any words after any command: a status that fits them, one line where they cannot be, no trace.

Models are tiny, and what takes long (tracing, measuring) is left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from embedding_tables import make_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import backbones
from backbones.cli import common, export, exporting, parity, summary, verify
from backbones.cli.doctor import Finding
from backbones.cli.main import COMMANDS, main
from backbones.training.checkpoint import save_weights

EXAMPLES = 130
TINY = {"dims": [16, 24], "depths": [1, 1], "attn_dims": [0, 8]}
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
    """A flag, or a positional word (""), with values that it takes and others that it refuses."""

    flag: str
    good: list[str]
    bad: list[str]
    required: bool = False


@dataclass(frozen=True)
class Line:
    """The words of a command, and whether one of them cannot be."""

    words: list[str] = field(default_factory=list)
    bad: bool = False


NO_TABLE = [*NO_FILE, "{0}/photos", "{0}/text.txt"]

RESULTS = [
    Option("--out", ["{0}/a.png", "/dev/null"], NO_TARGET, required=True),
    Option("--html", ["{0}/a.html", "/dev/null"], NO_TARGET),
    Option("--json", ["{0}/a.json", "/dev/null"], NO_TARGET),
    Option("--source", ["{0}/photos", "{0}/none"], [""]),
]
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
        Option("", ["{0}/photos", "{0}/photos/0.png"], NO_FILE, required=True),
        Option("--checkpoint", ["{0}/best.safetensors"], [*NO_FILE, "{0}/text.txt"], True),
        Option("--model", ["shvit_s1"], ["", "x", "hat_s_x2", "shvit_s1.nonsense"]),
        Option("--labels", ["{0}/labels.txt", "{0}/labels.json"], [*NO_TEXT, "{0}/text.txt"]),
        Option("--topk", ["1", "3", "99999999999"], BELOW_ONE),
        Option("--csv", ["{0}/a.csv", "/dev/null"], NO_TARGET),
        Option("--json", ["{0}/a.json", "/dev/null"], NO_TARGET),
        Option("--batch-size", ["1", "99999999999"], BELOW_ONE),
        Option("--device", ["cpu", "cpu:0"], NO_DEVICE),
    ],
    "embed": [
        Option("", ["{0}/photos"], ["", "{0}/none", "{0}/empty"], required=True),
        Option("--out", ["{0}/a"], ["", "{0}/none/below/that"], required=True),
        Option("--checkpoint", ["{0}/best.safetensors"], ["", "{0}/none"], required=True),
        # Those of the first call, which others resume.
        Option("--classes", ["0"], ["", "x", "-1", "1.5"]),
        Option("--dtype", ["float32"], ["", "x"]),
        Option("--rows", ["1024"], BELOW_ONE),
        Option("--workers", ["1"], BELOW_ONE),
    ],
    "search": [
        Option("", ["{0}/table"], NO_TABLE, required=True),
        Option("--key", ["00001.png"], ["x", "\udcff"], True),
        Option("--query", [], [*NO_FILE, "{0}/empty"]),
        Option("--top", ["1", "3", "99999999999"], BELOW_ONE),
        Option("--index", ["auto", "exact"], ["", "x"]),
        Option("--checkpoint", ["{0}/best.safetensors"], [""]),
        *RESULTS,
        Option("--csv", ["{0}/a.csv", "/dev/null"], NO_TARGET),
    ],
    "duplicates": [
        Option("", ["{0}/table"], NO_TABLE, required=True),
        Option("--threshold", ["1", "0.5"], ["", "x", "nan", "inf", "0", "-1", "1.01"]),
        Option("--index", ["auto", "exact"], ["", "x"]),
        *RESULTS,
        Option("--csv", ["{0}/a.csv", "/dev/null"], NO_TARGET),
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
        Option("--out", ["{0}/a.onnx", "{0}/a.pt2"], ["", "{0}/none/a"], True),
        Option("--format", ["pt2"], ["", "x", "ONNX"]),
        Option("--checkpoint", ["{0}/other/shvit.pth"], [*NO_FILE, "{0}/text.txt"]),
        Option("--size", ["32"], [*BELOW_ONE, "65535", "9" * 30]),
        Option("--batch", ["1", "2"], BELOW_ONE),
        Option("--calibration", [], ["", "{0}/none"]),
    ],
    "verify": [
        Option(
            "", ["shvit_s1", "{0}/other/shvit.pth"], ["", "x", "{0}/none", "{0}/photos/0.png"], True
        ),
        Option("--checkpoint", ["{0}/other/shvit.pth"], [*NO_FILE, "{0}/text.txt"], True),
        Option("--save-figures", ["{0}/a.json"], [*NO_TARGET, "{0}/other/shvit.pth"]),
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
        Option("--output", ["{0}/a.csv", "{0}/new/a.csv"], ["", "{0}", "{0}/text.txt/a"]),
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
        Option("--output", ["{0}/bench"], ["", "{0}", "{0}/text.txt/a"], True),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that good words name, in the current folder; what takes long does nothing."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    tiny = backbones.create_model("shvit_s1", num_classes=3, **TINY)
    save_weights(folder / "best.safetensors", tiny.state_dict(), {"model": "shvit_s1"})
    recipe = {"model": "shvit_s1", "model_args": TINY, "num_classes": 3, "img_size": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump({**recipe, "data": "x"}))
    (folder / "other").mkdir()  # where no recipe lies beside it
    whole = parity.checkpoint(parity.reference("shvit", "shvit_s1"))
    torch.save({"model": whole}, folder / "other" / "shvit.pth")
    hat = backbones.create_model("hat_nano_x2", **TINY_HAT)
    torch.save(hat.state_dict(), folder / "hat.pt")
    (folder / "text.txt").write_text("{}\n")
    (folder / "labels.txt").write_text("a\nb\nc\n")
    (folder / "labels.json").write_text('["a", "b", "c"]')
    (folder / "report.json").write_text('{"machine": {}, "results": []}')
    (folder / "classes.csv").write_text("".join(f"0000{i}.png,{'abab'[i]}\n" for i in range(4)))
    make_table(folder / "table", np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()
    pixels = np.random.RandomState(0).randint(0, 255, (2, 9, 8, 3)).astype(np.uint8)
    for place in ("photos", "data/validation/a", "data/validation/b", "data/validation/c"):
        (folder / place).mkdir(parents=True)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(folder / place / f"{number}.png")
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

    patch.setattr(summary, "create", _errors_as(common.create, on_meta))
    patch.setattr(verify, "create", _errors_as(common.create, on_meta))
    patch.setattr(summary, "describe", lambda *args: "a table\n")
    patch.setattr(verify, "_verify_code", lambda name: True)
    patch.setattr(export, "export", lambda *args: None)
    patch.setattr(exporting, "require_onnx", lambda: None)
    patch.setattr("ops.cpu.prepare", lambda isa: Path("\udcff"))
    patch.setattr("backbones.cli.doctor.examine", lambda: [Finding("x", "ok", "─ ✓ \udcff")])


def _errors_as(create: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`backbones.cli.common.create` with another way to make the model."""

    def call(name: str, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbones, "create_model", instead)
            return create(name, **kwargs)

    return call


def _without_measuring(globals: dict[str, Any]) -> None:
    """In a script of tools/, once it is loaded."""
    if "Validator" in globals:
        row = {"top1": 50.0, "top5": 100.0, "images": 6}
        globals["Validator"].measure = lambda self, candidate: {"model": candidate.name, **row}
    if "Row" in globals:
        globals["measure"] = lambda row, *args: {**row.key, "contenders": {}}
        globals["table"] = lambda report: ""
        globals["gc"] = SimpleNamespace(collect=lambda: 0)  # a second with all that tests import
        globals["draw"] = lambda report, path: path.write_text("")


@st.composite
def lines(draw: st.DrawFn, command: str) -> Line:
    """Every option that must be there, some of the others; most values as they should be."""
    words: list[str] = []
    bad = False
    spoil = draw(st.sets(st.integers(0, len(OPTIONS[command]) - 1), max_size=2))
    for number, option in enumerate(OPTIONS[command]):
        values = option.bad if number in spoil else option.good
        if not values or not (number in spoil or option.required or draw(st.booleans())):
            continue
        bad |= number in spoil
        value = draw(st.sampled_from(values))
        if not option.flag:
            # After "--" a word that begins with a dash is no option.
            words += [value]
        elif draw(st.booleans()) or value.startswith("-"):
            words += [f"{option.flag}={value}"]
        else:
            words += [option.flag, value]
    return Line(words, bad)


_CHARACTERS = st.characters(exclude_characters="\0/.~", categories=["L", "N", "P", "S", "Z", "C"])


@st.composite
def nonsense(draw: st.DrawFn, command: str) -> Line:
    """A line with words of any characters put in or left out."""
    words = list(draw(lines(command)).words)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(words)))
        if words and draw(st.booleans()):
            del words[min(place, len(words) - 1)]
        else:
            words.insert(place, draw(st.text(_CHARACTERS, max_size=12)))
    return Line(words)


def run(command: str, words: list[str]) -> tuple[int, str]:
    """Status and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([command, *words])
    return status, err.getvalue()


def held(folder: Path) -> dict[str, bytes]:
    """What good words only read."""
    names = ("best.safetensors", "config.yaml", "hat.pt", "text.txt", "labels.txt", "labels.json")
    paths = [*(folder / name for name in names), *(folder / "photos").iterdir()]
    return {str(path): path.read_bytes() for path in paths}


def _fits(option: Option) -> list[str]:
    return [option.good[0]] if not option.flag else [f"{option.flag}={option.good[0]}"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        pytest.param(command, option, id=f"{command} {option.flag}")
        for command, options in OPTIONS.items()
        if not COMMANDS[command][0].endswith(".py")  # their arguments: tests/tools
        for option in options
        if "" in option.bad
    ],
)
def test_an_empty_word(command: str, option: Option, folder: Path) -> None:
    others = [o for o in OPTIONS[command] if o.required and o is not option]
    words = [word for o in others for word in _fits(o)]
    words.append(f"{option.flag}=" if option.flag else "")
    before = set(folder.rglob("*"))
    status, said = run(command, [word.replace("{0}", str(folder)) for word in words])
    assert status == 2
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize("place", ["backbones", "tools"])
def test_no_path_may_be_empty(place: str) -> None:
    """``Path("")`` is the current folder."""
    files = (Path(__file__).parents[2] / place).rglob("*.py")
    assert [file.name for file in files if "type=Path" in file.read_text()] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_random_command_lines(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    loaded = runpy.run_path
    kept: dict[str, dict[str, Any]] = {}

    def run_path(path: str) -> dict[str, Any]:
        if path not in kept:
            kept[path] = loaded(path)
            _without_measuring(kept[path]["main"].__globals__)
        return kept[path]

    monkeypatch.setattr(runpy, "run_path", run_path)
    before = held(folder)
    seen = {0: 0, 1: 0, 2: 0}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(lines(command), lines(command), nonsense(command)), st.booleans())
    def check(line: Line, _: bool) -> None:
        words = [word.replace("{0}", str(folder)) for word in line.words]
        status, said = run(command, words)
        seen[status] += 1
        told = [text for text in said.splitlines() if text.startswith("error: ")]
        assert status in (0, 1, 2)
        assert "Traceback" not in said
        if line.bad:
            assert status == 2
        if status == 2:
            assert len(told) == 1
            assert said.endswith(f"{told[0]}\n")
            assert len(told[0]) < 2000

    check()
    assert held(folder) == before
    assert not (folder / "nan").exists()
    assert seen[2] > EXAMPLES // 10
    if command != "doctor":
        assert seen[0] + seen[1] > EXAMPLES // 10
    sys.stdout.flush()
