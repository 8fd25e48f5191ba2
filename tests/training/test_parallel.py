"""Sharded training: every family runs, and its full state is restored."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from training_runs import Runs, a_few, make_images, same
from zoo import CLASSIFIERS, small

from backbones.common.errors import RecipeError
from backbones.common.processes import World
from backbones.training import parallel
from backbones.training.command_line import parse_command_line

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", a_few(CLASSIFIERS))
def test_every_family_can_be_sharded(family, group):
    model, images = small(family, num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    logits = model(images)
    logits.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    shared = parallel.shard(small(family, num_classes=3).eval(), ALONE)
    assert all(isinstance(p, DTensor) for p in shared.parameters())
    answer = shared(images)
    torch.testing.assert_close(answer, logits)
    answer.square().sum().backward()
    for name, parameter in shared.named_parameters():
        if grads[name] is not None:
            torch.testing.assert_close(parallel.full_state(parameter.grad), grads[name])
    assert same(parallel.full_state(dict(shared.state_dict())), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["weight", "running_var"])
@pytest.mark.parametrize("value", [float("nan"), 1e13])
def test_weights_and_statistics_are_bounded(name, value):
    norm = torch.nn.BatchNorm2d(3)
    assert parallel.is_bounded(norm, ALONE)
    getattr(norm, name).data[1] = value
    assert not parallel.is_bounded(norm, ALONE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--opt lamb", "opt must be of .*adamw.* with fsdp, not 'lamb'"),
        ("--clip-grad 0.1 --clip-mode agc", "clip_mode must be norm or value with fsdp"),
        ("--amp fp16", "amp must be bf16 with fsdp"),
        ("--channels-last", "channels_last must be false with fsdp"),
        ("--compile", "compile must be false with fsdp"),
        (
            "--distill ofa --teacher van_b0 --teacher-checkpoint x.pt",
            "distill must be soft or hard with fsdp",
        ),
    ],
)
def test_unsupported_with_sharding(words, message):
    with pytest.raises(RecipeError, match=message):
        parse_command_line(["--fsdp", *words.split()])


def test_sharding_needs_several_processes(tmp_path, capsys):
    images = make_images(tmp_path / "images", {"train": 9, "val": 3})
    runs = Runs(tmp_path, capsys, f"--data={images}")
    assert "fsdp needs torchrun" in runs.refuse("--fsdp", "--epochs=1")
