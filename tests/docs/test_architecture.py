"""The architecture page names files, rules and inference forms that exist."""

from __future__ import annotations

import re

from pages import DOCS, ROOT

from backbones.cli.main import run_command
from ops.cpu import instruction_sets, policy
from ops.inference import attention, layers

PAGE = (DOCS / "architecture.md").read_text()


def test_what_it_names_exists():
    """Headers in ``common/`` are named without the engine's folder."""
    paths = set(re.findall(r"[\w./]+/[\w.]*|\w+\.(?:py|h|cpp)", PAGE))
    for path in (path.rstrip(".") for path in paths):
        if path.startswith(("backbones/", "ops/", "tests/", "tools/", "common/")):
            assert (ROOT / path).exists() or (ROOT / "ops/cpu" / path).exists(), path
    rules = set(re.findall(r"(\w+_by_kernel):", PAGE))
    assert rules and rules <= vars(policy).keys()
    assert "HiLoAttention → FastHiLoAttention" in PAGE and "a convolution to FastConv2d" in PAGE
    assert attention.FastHiLoAttention and layers.FastConv2d


def test_instruction_sets_are_those_of_the_engine():
    table = PAGE.split("## Instruction sets")[1].split("\n## ")[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert set(names) == set(instruction_sets.FLAGS)


def test_the_sample_is_what_the_command_prints(capsys):
    """Headings and notes; the rows depend on the CPU."""
    assert run_command("summary", ["van_b0", "--kernels", "--size", "32", "--runs", "1"]) == 0
    title, _, head, *_, notes, door, memory = capsys.readouterr().out.rstrip().splitlines()
    assert f"\n{title.partition(':')[0]}: " in PAGE
    assert head.split() == re.search(r"^layer .*$", PAGE, re.MULTILINE)[0].split()
    assert notes in PAGE and door.replace("32×32", "224×224") in PAGE
    assert re.sub(r"[\d.]+", "N", memory) in re.sub(r"[\d.]+", "N", PAGE)
