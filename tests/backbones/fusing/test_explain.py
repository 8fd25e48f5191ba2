"""``explain()``: calls with layers, rules and figures; the model is unchanged."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from compiled_kernels import using_threads
from zoo import FAMILIES, images, small

import backbones
from backbones.cli.measure import count_macs
from backbones.fusing.explain import BufferUse, MemoryUse
from ops.rewriting.profile import TracedCall

# Fused models that compute a little less, or more, than the plain ones: branches that become one
# convolution (OverLoCK, UniRepLKNet), a mean that a linear layer takes over (FaViT) or that is
# of its inputs (ECA-Net), padded maps (LITv2).
MERGED = {"ecanet": 0.01, "favit": 0.04, "litv2": 0.01, "overlock": 0.07, "unireplknet": 0.05}
# Layers that take a part of a map's channels, which has to be copied first, or keys of few regions.
PARTS = re.compile(r"stages\.3\.downsample\.[xh]_proj|stages\.[23]\.blocks\.\d\.mix")


def _macs(calls: list[TracedCall]) -> float:
    return sum(call.flops or 0 for call in calls) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model = small(family).eval()
    macs = count_macs(model, 48, 33)
    plain = backbones.explain(model, (48, 33), repeats=1)
    assert _macs(plain.calls) == macs
    assert not plain.is_fused and plain.memory is None and plain.not_replayed is None

    fused = backbones.explain(model.fuse(), (48, 33), batch_size=2, repeats=1)
    assert _macs(fused.calls) == pytest.approx(2 * macs, rel=MERGED.get(family, 1e-9))
    assert fused.is_fused and fused.memory is not None and fused.not_replayed is None
    paths = dict(model.named_modules())
    for call in fused.calls:
        assert call.layer in paths
        assert call.seconds > 0 and call.dtype and call.outputs
        assert (call.instruction_set is None) == (call.library != "ours")
        copies = call.kernel in ("clone", "contiguous")
        assert not copies or (family == "overlock" and PARTS.fullmatch(call.layer)), call.layer
    ours = sum(call.library == "ours" for call in fused.calls)
    assert 2 * ours >= len(fused.calls)
    shares = sum(fused.share(call.seconds) for call in fused.calls)
    assert shares + fused.share(fused.between) == pytest.approx(1)


def test_calls_match_the_layers() -> None:
    model = small("van").eval().fuse()
    found = backbones.explain(model, 64, repeats=2)
    first, last = found.calls[0], found.calls[-1]
    assert (first.layer, first.kernel) == ("stem", "packed_stem")
    assert first.inputs[0] == (1, 3, 64, 64)
    assert last.layer == "head.fc" and last.kernel == "packed_linear"
    assert last.inputs[0] == (1, model.num_features) and last.outputs == [(1, 1000)]
    assert last.flops == 2 * model.num_features * 1000
    assert [asked.rule for asked in last.rules] == ["linear_by_kernel"]
    assert last.rule.startswith("linear_by_kernel: rows 1 ≤ ")
    depthwise = [call for call in found.calls if call.kernel == "depthwise_conv2d"]
    assert all("depthwise_by_kernel" in call.rule for call in depthwise)


def test_memory_plan() -> None:
    found = backbones.explain(small("van").eval().fuse(dtype=torch.bfloat16), 64, repeats=1)
    assert found.dtype == "bfloat16" and "bfloat16" in {call.dtype for call in found.calls}
    memory = found.memory
    assert memory is not None
    assert memory.peak <= memory.nbytes < sum(buffer.nbytes for buffer in memory.planned)
    assert memory.reuse > 1
    images_, result = memory.buffers[0], memory.buffers[-1]
    assert images_.first == -1 and images_.offset is None and images_.shape == (1, 3, 64, 64)
    assert result.last == len(found.calls) and result.offset is None
    # During a call, what it reads and what it writes are live.
    one, other = BufferUse(0, 1, 0, 4, (1,)), BufferUse(1, 2, 8, 3, (1,))
    assert MemoryUse(16, [one, other]).peak == 7


def test_text_and_json() -> None:
    found = backbones.explain(small("van", in_chans=1).eval().fuse(), 64, repeats=1)
    lines = str(found).splitlines()
    assert lines[0].startswith("van_b0, fused: 1×1×64×64 float32, ")
    assert lines[2].split()[:5] == ["layer", "kernel", "shapes", "dtype", "set"]
    assert lines[4].startswith("stem ") and "1×1×64×64 → 1×32×16×16" in lines[4]
    assert any(line.startswith("between calls") for line in lines)
    assert lines[-1].startswith("Memory: ") and "reuse" in lines[-1]
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["input_shape"] == [1, 1, 64, 64]
    assert len(told["calls"]) == len(found.calls)
    assert told["calls"][-1]["layer"] == "head.fc" and told["calls"][-1]["gflops_per_second"] > 0
    assert told["memory"]["nbytes"] == found.memory.nbytes


def test_no_plan_without_replay() -> None:
    """A hook inside wants its module to be called: by the layers, which are timed as they are."""
    found = backbones.explain(small("van").eval().fuse(channels_last=False), 64, repeats=1)
    assert found.is_fused and found.memory is None
    assert found.not_replayed == "its layers are those of torch, not in channels last"
    model = small("shvit").eval().fuse()
    seen: list[Any] = []
    model.stages[0].register_forward_hook(lambda *_: seen.append(1))
    found = backbones.explain(model, 64, repeats=1)
    assert found.memory is None and seen
    assert found.not_replayed == "a call changes the module"
    assert "Not replayed, runs layer by layer: a call changes the module." in str(found)
    assert "the model, forward(1×3×64×64): watched (a call changes the module)" in found.doors
    assert "Memory" not in str(found)
    assert found.to_dict()["memory"] is None


@pytest.mark.parametrize(("size", "threads"), [((64, 64), 1), ((48, 33), 2)])
@torch.no_grad()
def test_the_model_is_unchanged(size: tuple[int, int], threads: int) -> None:
    """Also where layers pack weights that they had no need of before."""
    model, x = small("van").eval().fuse(), images(1, 3, 64, 64)
    outs = [model(x) for _ in range(6)]
    before = [dict(vars(module)) for module in model.modules()]
    with using_threads(threads):
        backbones.explain(model, size, repeats=1)
        assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()
    for module, values in zip(model.modules(), before, strict=True):
        assert [*vars(module)] == [*values]
        assert all(vars(module)[name] is value for name, value in values.items())
    assert model.is_replayed and torch.equal(model(x), outs[-1])


def test_a_model_in_training_mode_is_not_trained() -> None:
    model = small("shvit").train()
    model.stages[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    backbones.explain(model, 64, repeats=1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model._forward_hooks == {} and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"input_size": 0}, ValueError, "input_size must be in 1 … 65536, got 0"),
        ({"input_size": (64,)}, ValueError, r"\(H, W\) or \(3, H, W\), got \(64,\)"),
        ({"input_size": (1, 3, 8, 8)}, ValueError, "a side"),
        ({"input_size": (4, 64, 64)}, ValueError, "images of 3 channels"),
        ({"input_size": (64, -1)}, ValueError, r"input_size\[1\] must be in"),
        ({"input_size": "64"}, TypeError, "input_size must be a sequence"),
        ({"input_size": 6.5}, TypeError, "input_size must be a whole number"),
        ({"input_size": 1}, ValueError, "1×1 are too small"),
        ({"batch_size": 0}, ValueError, "batch_size must be in"),
        ({"repeats": 0}, ValueError, "repeats must be in"),
        ({"model": small("shvit").to("meta")}, ValueError, "on the CPU .* on meta"),
        ({"model": 3}, TypeError, "a torch module, got a int"),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    model = small("inception_next").eval()
    for given in (model, copy.deepcopy(model).fuse()):
        with pytest.raises(error, match=said):
            backbones.explain(**{"model": given, "input_size": 64, **arguments})
