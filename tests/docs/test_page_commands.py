"""Every command in README, the guides and the other pages runs in a fresh clone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator

import pages
import pytest
from clones import Workshop, fresh_clone
from stand_ins import DOWNLOADS
from torch.distributed.run import parse_args
from training_runs import TINY

COMMANDS = sorted({text for page in pages.PAGES for text in pages.commands(page)})

# What is not run, by a pattern of the whole command, and why.
NOT_RUN = {
    r"make .*": "makes an environment of its own",
    r"git clone .*": "clones from the network",
    r"pip install .*": "installs from the network",
    r"(.* )?pip wheel.*": "compiles for minutes; tests/tools/test_wheel.py does it",
    r"export \w+=\S+": "sets a variable",
    r"vision-backbones validate .* --real-labels": "downloads weights, needs ImageNet's names",
    r"#!/bin/bash\n#SBATCH (.|\n)*": "asks Slurm for two nodes of eight GPUs",
    r"ray start .*": "makes this machine one of a cluster; so does tests/embedding/test_cluster.py",
    r"pytest .*": "runs these tests",
    r"kubectl .*": "asks a cluster of Kubernetes",
    r"vision-backbones embed .* --engine ray --address auto": "needs that cluster",
    r"(\w+=\S+ )?python tools/accuracy\.py (?!parity).*": "trains or measures for minutes",
    r"python tools/benchmark\.py .*": "measures for minutes",
    r"vision-backbones benchmark .* docs/performance/.*": "measures for minutes",
    r"vision-backbones benchmark (MODEL|van_b0)": "measures for a minute",
}
# What stands in a page for something of the reader's.
REPLACED = {
    "/path/to/images": "images",
    "/path/to/imagenet": "images",
    "FAMILY": "efficientvit",
    "<family>": "efficientvit",
    "FILE": "docs/performance/zoo.json",
}
_SHORT = "--epochs 1 --workers 0 --threads 1"
_SHORT_MM = (
    "--cfg-options param_scheduler=None default_hooks.checkpoint.save_last=False"
    " train_dataloader.num_workers=0 train_dataloader.persistent_workers=False"
    " train_dataloader.dataset.pipeline.2.scale=(64,64)"
)
_SMALL_SET = "--cfg-options quickstart_data.train=4 quickstart_data.val=2"
# Further words for a command of this pattern: they make it short.
SHORTER = {
    r".* train_cls\.py --config configs/cls/quickstart\.yaml": (
        f"--epochs 1 --img-size 32 {shlex.join(TINY[1:])}"
    ),
    r".* train_cls\.py --config configs/cls/bench_digits\.yaml .*": "--epochs 1 --img-size 32",
    r".* train_cls\.py .* --data .*": (
        f"{_SHORT} --cooldown-epochs 0 --batch-size 2 --accum-steps 1 --img-size 32 --min-lr 0"
    ),
    r".* tools/sr\.py train --config configs/sr/quickstart\.yaml": (
        "--epochs 1 --updates-per-epoch 2"
    ),
    r".* tools/sr\.py train .* --train-pictures .*": (
        f"{_SHORT} --updates-per-epoch 1 --batch-size 1 --patch-size 16"
    ),
    r".* tools/mm\.py train configs/det/quickstart.*": f"{_SMALL_SET} train_cfg.max_epochs=1",
    r".* tools/mm\.py train configs/seg/quickstart.*": f"{_SMALL_SET} train_cfg.max_iters=2",
    r".* tools/mm\.py train configs/det/van/.*": (
        f"{_SHORT_MM} train_cfg.max_epochs=1 train_cfg.val_interval=2"
        " model.train_cfg.rcnn.sampler.num=8 model.train_cfg.rpn_proposal.max_per_img=8"
        " model.roi_head.bbox_head.fc_out_channels=32"
    ),
    r".* tools/mm\.py train configs/seg/van/.*": (
        f"{_SHORT_MM} train_cfg.max_iters=1 train_cfg.val_interval=2"
        " train_dataloader.dataset.pipeline.3.crop_size=(64,64)"
        " model.data_preprocessor.size=(64,64) model.decode_head.channels=32"
        " model.auxiliary_head.channels=32"
    ),
    r".* tools/mm\.py test configs/det/van/.*": (
        "--cfg-options test_dataloader.num_workers=0 test_dataloader.persistent_workers=False"
        " test_dataloader.dataset.pipeline.1.scale=(64,64) model.test_cfg.rpn.max_per_img=8"
    ),
    r"vision-backbones export .*": "--size 64",
    r"vision-backbones upscale .* --tta.*": "--tile none",
    r"vision-backbones validate .* --corrupt": "brightness --severity 1 --workers 0",
    r"python tools/accuracy\.py parity": "efficientvit",
    r"python -m pytest .*": "--collect-only --quiet --assert plain",
}
QUICK = re.compile(r"vision-backbones (doctor|verify|predict .*--pretrained)\b.*")
# Options that name a file to write.
_WRITES = ("--out", "--cam", "--csv", "--report")
_SECONDS = 240


def reason(text: str) -> str | None:
    """Why a command is not run; None if it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, text)), None)


def words_of(text: str) -> list[str]:
    """The command with what is put in for placeholders, and with what makes it short."""
    words = [REPLACED.get(word, word) for word in shlex.split(text)]
    more = [extra for pattern, extra in SHORTER.items() if re.fullmatch(pattern, text)]
    return [*words, *shlex.split(" ".join(more))]


# One of those that differ in a placeholder alone.
RUN = list({tuple(words_of(text)): text for text in COMMANDS if reason(text) is None}.values())


def python_words(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """What follows ``python`` where the command runs without what was installed; its environment.

    torchrun's words are parsed, and its script is run as the only one of its processes.
    """
    program, *rest = words
    if program == "python":
        return rest, {}
    if program == "vision-backbones":
        return ["-m", "backbones.cli", *rest], {}
    assert program == "torchrun", f"nothing runs this here; give a reason in NOT_RUN: {words}"
    options = parse_args(rest)
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return [options.training_script, *options.training_script_args], environment


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bool], Workshop]]:
    """A function that gives the workshop for OpenMMLab's commands, or for all others."""
    clone = tmp_path_factory.mktemp("workshop") / "clone"
    open_ones: dict[bool, Workshop] = {}
    kinds = {False: ("backbones.cli.main", "train_cls", "backbones.restoration.train")}
    kinds[True] = ("backbones.openmmlab.runs", "mmdet.apis", "mmseg.apis")

    def give(openmmlab: bool) -> Workshop:
        if not clone.exists():
            fresh_clone(clone)
        if openmmlab not in open_ones:
            open_ones[openmmlab] = Workshop(clone, kinds[openmmlab])
        return open_ones[openmmlab]

    yield give
    for one in open_ones.values():
        one.close()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=text[:90], marks=[] if QUICK.fullmatch(text) else pytest.mark.slow)
        for text in RUN
    ],
)
def test_command_runs(text, workshop, shelf, tmp_path):
    words = words_of(text)
    program, environment = python_words(words)
    clone = fresh_clone(tmp_path / "clone")
    shelf.provide(words, clone)
    environment["TORCH_HOME"] = str(clone / DOWNLOADS)
    workshop("/mm.py" in text).run(program, clone, _SECONDS, environment)
    for option, value in zip(words, words[1:], strict=False):
        if option in _WRITES:
            assert (clone / value).exists(), f"{option} {value} was not written"


def test_every_command_is_run_or_listed():
    """What is run at length is slow; that a new command is none that can be run is seen at once."""
    for text in RUN:
        python_words(words_of(text))
