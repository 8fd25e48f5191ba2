"""``--fuse``: the best weights before and after ``fuse()``, once the run is complete."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from training_runs import Runs, join, make_images, same, train

import backbones
from backbones.common.errors import RecipeError
from backbones.common.progress import Progress
from backbones.common.signals import StopRequest
from backbones.restoration.recipe import RestorationRecipe
from backbones.training import comparison
from backbones.training.command_line import load_recipe
from backbones.training.record import RESULTS
from ops import cpu

ROW = r"(plain|fused) +(\d+\.\d\d) % +(\d+\.\d\d) +(\d+\.\d\d)×"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 7})


@pytest.fixture(scope="module")
def complete(images, tmp_path_factory):
    """A complete run without a comparison."""
    runs = Runs(tmp_path_factory.mktemp("complete"), None, f"--data={images}", "--epochs=1")
    assert join([runs.start()]) == [0]
    return runs.folder


@pytest.fixture
def resumed(complete, runs):
    """A function that resumes a copy of the complete run, and returns what is printed."""
    shutil.copytree(complete, runs.folder)
    return lambda *words: runs.train("--epochs=1", "--resume=auto", "--fuse", *words)


def test_plain_and_fused_are_printed(runs):
    threads = torch.get_num_threads()
    printed = runs.train("--epochs=1", "--fuse")
    rows = {name: row for name, *row in re.findall(ROW, printed)}
    assert list(rows) == ["plain", "fused"]
    best = re.findall(r"best accuracy (\S+) %", printed)
    assert rows["plain"][0] == rows["fused"][0] == best[0]
    assert rows["plain"][2] == "1.00" and "\n7 validation images in float32" in printed
    assert f"compiled for {cpu.status('gemm').instruction_set}" in printed
    assert torch.get_num_threads() == threads


def test_nothing_is_compared_by_default(runs):
    assert not re.search(ROW, runs.train("--epochs=1"))


def test_a_complete_run_is_compared_again_and_stays_as_it_is(resumed, runs):
    before = runs.state()
    for _ in range(2):
        assert len(re.findall(ROW, resumed())) == 2
    assert same(runs.state(), before)


def test_an_error_costs_the_comparison_only(runs, monkeypatch):
    def fail(model):
        raise ZeroDivisionError("of\nan engine")

    monkeypatch.setattr(backbones, "fuse", fail)
    printed = runs.train("--epochs=1", "--fuse")
    assert printed.endswith("\nnot compared with the fused network: ZeroDivisionError: of\n")
    assert all((runs.folder / name).exists() for name in ("best.safetensors", "last.pt"))
    assert list(RESULTS)[0] in printed and "best accuracy" in printed


def test_missing_weights(resumed, runs):
    (runs.folder / "best.safetensors").unlink()
    assert "not compared with the fused network: FileNotFoundError" in resumed()


def test_machines_without_kernels_are_named(resumed, monkeypatch):
    state = cpu.LibraryState(None, None, "avx2", "no C++ compiler found")
    monkeypatch.setattr(comparison.cpu, "status", lambda name: state)
    printed = resumed()
    assert len(re.findall(ROW, printed)) == 2
    wanted = "\nfused without compiled kernels, which would be faster: no C++ compiler found\n"
    assert printed.endswith(wanted)


def test_two_processes_end_well(runs):
    """Of which one compares, while the other has left."""
    assert join(runs.start_two("--epochs=1", "--fuse")) == [0, 0]


def test_it_is_a_key_of_classifiers_only():
    assert load_recipe(None, {"model": "x", "fuse": "true"}).fuse is True
    with pytest.raises(RecipeError, match="fuse must be"):
        load_recipe(None, {"model": "x", "fuse": "often"})
    with pytest.raises(RecipeError, match="fuse"):
        load_recipe(None, {"model": "x", "fuse": True}, RestorationRecipe)


# --- what is measured, with a clock that only networks move


@dataclass
class Clock:
    now: float = 0.0
    names: list[str] = field(default_factory=list)  # of the networks called
    seen: list[float] = field(default_factory=list)  # the images


CLOCK = Clock()


class Network(nn.Module):
    """Classifies an image by its first pixel; the first calls of a fused one take longer."""

    name, seconds, slow = "plain", 8.0, 0

    def forward(self, x):
        assert x.shape == (1, 1, 2, 2) and torch.get_num_threads() == 1 and not self.training
        CLOCK.names.append(self.name)
        CLOCK.seen.append(x[0, 0, 0, 0].item())
        CLOCK.now += 1000.0 if self.slow > 0 else self.seconds
        self.slow -= 1
        return nn.functional.one_hot(x[:, 0, 0, 0].long() % 3, 3).float()


def fused(network):
    network.name, network.seconds, network.slow = "fused", 2.0, 3
    return network


@pytest.fixture
def compare(monkeypatch):
    """A function that compares the network with its fused form on batches of labels."""
    CLOCK.__init__()
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: CLOCK.now)
    monkeypatch.setattr(comparison.backbones, "fuse", fused)

    def run(*labels, count=None, stop=None):
        batches, first = [], 0
        for batch in labels:
            numbers = torch.arange(first, first + len(batch)).float()
            batches.append((numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.tensor(batch)))
            first += len(batch)
        arguments = Network().eval(), batches, count or first, Progress(False)
        return comparison.compare(*arguments, stop or StopRequest())

    return run


def rows_of(found):
    return re.findall(ROW, found.report("a CPU"))


def test_calls_alternate_after_a_warm_up(compare):
    found = compare([0, 1, 2], [0, 0])
    assert rows_of(found) == [
        ("plain", "80.00", "8000.00", "1.00"),
        ("fused", "80.00", "2000.00", "4.00"),
    ]
    timed = CLOCK.names[2 * comparison._WARM_UP :]
    assert timed == ["fused", "plain", "plain", "fused"] * 2 + ["fused", "plain"]
    assert CLOCK.seen[2 * comparison._WARM_UP :: 2] == [0, 1, 2, 3, 4]
    assert "5 validation images" in found.report("a CPU") and "a CPU;" in found.report("a CPU")


def test_images_without_labels_are_left_out(compare):
    found = compare([0, -1, 2], [-1, -1])
    assert len(found.labels) == 2 and {row[1] for row in rows_of(found)} == {"100.00"}
    with pytest.raises(ValueError, match="no validation images"):
        compare([-1, -1])


def test_of_many_images_every_nth_is_taken(compare, monkeypatch):
    monkeypatch.setattr(comparison, "_MOST_IMAGES", 4)
    found = compare([0] * 7, [0] * 3)
    assert found.labels.shape == (4,)
    assert CLOCK.seen[2 * comparison._WARM_UP :: 2] == [0, 3, 6, 9]


def test_several_labels_are_compared_by_their_auc(compare):
    found = compare([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [-1, -1, -1]])
    assert [row[1] for row in rows_of(found)] == ["100.00", "100.00"]
    assert "AUC" in found.report("a CPU")


def test_a_signal_ends_it(compare):
    stop = StopRequest()
    stop.signal = 15
    assert compare([0, 1], stop=stop) is None


def test_the_status_after_a_signal(runs, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "compare", lambda *given: setattr(given[-1], "signal", 15))
    assert train(*runs.words("--epochs=1", "--fuse")) == 128 + 15
    said = capsys.readouterr().out
    assert said.endswith("stopped by signal 15 before the fused network was measured\n")
    assert (runs.folder / "best.safetensors").exists()
