"""``explain()``: which kernel computes each layer of a model, why it is that one, and how fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import several, whole
from backbones.core.messages import shown
from backbones.core.tables import table
from ops.cpu.build import instruction_set
from ops.replay.profile import Profile, profile
from ops.replay.trace import TracedCall

__all__ = ["BufferUse", "Explanation", "MemoryUse", "explain"]

_LARGEST_SIDE = 1 << 16
_MOST_IMAGES = 1 << 16
_MOST_REPEATS = 10**6


@dataclass
class BufferUse:
    """A piece of memory between calls.

    Attributes:
        first, last: the calls, by their index, that use it first and last. The input is there
            before the first call (-1), and the result is left after the last one.
        offset: where in the workspace it begins; None of what lies elsewhere: the input, the
            result and what torch allocates.
        nbytes: how large it is.
        shape: of the tensor that it was made for.
    """

    first: int
    last: int
    offset: int | None
    nbytes: int
    shape: tuple[int, ...]


@dataclass
class MemoryUse:
    """The memory plan of a model that is replayed.

    Attributes:
        nbytes: of the workspace, which buffers share.
        buffers: all of them.
    """

    nbytes: int
    buffers: list[BufferUse] = field(repr=False)

    @property
    def planned(self) -> list[BufferUse]:
        """Those in the workspace."""
        return [buffer for buffer in self.buffers if buffer.offset is not None]

    @property
    def reuse(self) -> float:
        """How many times the workspace its buffers would take, if each had memory of its own."""
        total = sum(buffer.nbytes for buffer in self.planned)
        return total / self.nbytes if self.nbytes else 1.0

    @property
    def peak(self) -> int:
        """The most bytes of the workspace's buffers that are in use at a time."""
        starts = {buffer.first for buffer in self.planned}
        return max(
            (sum(b.nbytes for b in self.planned if b.first <= now <= b.last) for now in starts),
            default=0,
        )


@dataclass
class Explanation:
    """What :func:`explain` found; ``print`` it.

    Attributes:
        model: the architecture's name.
        input_shape: (B, C, H, W).
        dtype: of parameters and images.
        threads: of torch.
        instruction_set: what kernels are compiled for and rules are asked for.
        is_fused: whether layers have their inference forms.
        seconds: of one call of the model: the median.
        calls: kernels and functions in the order in which they run, see
            :class:`ops.replay.trace.TracedCall`.
        memory: the plan, if the model is replayed, else None.
        not_replayed: why a fused model is not; None where it is.
    """

    model: str
    input_shape: tuple[int, ...]
    dtype: str
    threads: int
    instruction_set: str
    is_fused: bool
    seconds: float
    calls: list[TracedCall] = field(repr=False)
    memory: MemoryUse | None = None
    not_replayed: str | None = None

    @property
    def between(self) -> float:
        """Seconds that pass between the calls, in Python."""
        return max(0.0, self.seconds - sum(call.seconds for call in self.calls))

    def share(self, seconds: float) -> float:
        """Of the time of all rows; the shares of the calls and of ``between`` add up to 1."""
        return seconds / (self.between + sum(call.seconds for call in self.calls))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text, lists and dictionaries, as JSON has them."""
        memory = self.memory
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "input_shape": list(self.input_shape),
            "between": self.between,
            "calls": [self._call_as_dict(call) for call in self.calls],
            "memory": memory
            and {
                **{name: getattr(memory, name) for name in ("nbytes", "peak", "reuse")},
                "buffers": [{**asdict(b), "shape": list(b.shape)} for b in memory.buffers],
            },
        }

    def _call_as_dict(self, call: TracedCall) -> dict[str, Any]:
        return {
            **{name: getattr(call, name) for name in _OF_CALLS},
            "inputs": [list(shape) for shape in call.inputs],
            "outputs": [list(shape) for shape in call.outputs],
            "share": self.share(call.seconds),
            "gflops_per_second": _rate(call),
        }

    def __str__(self) -> str:
        """A table with a row for each call, and what the memory plan comes to."""
        rows = [
            [
                call.layer or "(model)",
                call.kernel if call.library == "ours" else f"{call.library} {call.kernel}",
                " → ".join(_sides(shapes[:1]) for shapes in (call.inputs, call.outputs)),
                call.dtype,
                call.instruction_set or "",
                *self._times(call.seconds),
                "" if (rate := _rate(call)) is None else f"{rate:.1f}",
                call.rule,
            ]
            for call in self.calls
        ]
        rows.append(["between calls", "Python", "", "", "", *self._times(self.between), "", ""])
        flops = sum(call.flops or 0 for call in self.calls)
        last = ["total", f"{len(self.calls)} calls", "", "", "", f"{1e3 * self.seconds:.3f}", ""]
        rows.append([*last, f"{flops / self.seconds / 1e9:.1f}", ""])
        text = table(_HEAD, rows, left=5, last_left=True)
        return f"{self._title()}\n\n{text}\n{self._notes()}\n"

    def _times(self, seconds: float) -> tuple[str, str]:
        return f"{1e3 * seconds:.3f}", f"{100 * self.share(seconds):.1f} %"

    def _title(self) -> str:
        form = "fused" if self.is_fused else "not fused"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        size = _sides([self.input_shape])
        return f"{self.model}, {form}: {size} {self.dtype}, {threads}, {self.instruction_set}"

    def _notes(self) -> str:
        lines = [
            "Without a rule there is nothing to choose. GFLOP/s: of convolutions and matrix "
            "products, where they are counted."
        ]
        memory = self.memory
        if self.not_replayed is not None:
            lines.append(f"Layer by layer, without a graph: {self.not_replayed}.")
        if memory is not None:
            total = sum(buffer.nbytes for buffer in memory.planned)
            lines.append(
                f"Memory: {len(memory.planned)} buffers of {_mebibytes(total)} share a workspace "
                f"of {_mebibytes(memory.nbytes)} (reuse {memory.reuse:.1f}×); at most "
                f"{_mebibytes(memory.peak)} are in use at a time."
            )
        return "\n".join(lines)


_PLAIN = (*("model", "dtype", "threads", "instruction_set", "is_fused", "seconds", "not_replayed"),)
_OF_CALLS = ("layer", "library", "kernel", "dtype", "instruction_set", "rule", "flops", "seconds")
_HEAD = ("layer", "kernel", "shapes", "dtype", "set", "ms", "share", "GFLOP/s", "rule")


def explain(
    model: nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    batch_size: int = 1,
    repeats: int = 10,
) -> Explanation:
    """Which kernels and functions of torch compute a model, in their order, why, and how fast.

    A model is explained as it is: fuse it to see what :func:`backbones.fuse` makes of it. One that
    is replayed has the times of its replays. It runs some times, in evaluation mode and inference
    mode, and is left as it was. With one thread, what other processes take of the CPU does not
    count.

    Args:
        model: of :func:`backbones.create_model`, on the CPU.
        input_size: of the images: a side, (H, W) or (C, H, W); default the model's own.
        batch_size: how many images at a time.
        repeats: calls that times are medians of.

    Returns:
        :class:`backbones.Explanation`: ``print`` it, or take its ``calls`` and ``memory``.

    Raises:
        TypeError: no such model, or numbers that are none.
        ValueError: a model on another device, or a size, a batch or repeats out of their range.
    """
    if not isinstance(model, StagedBackbone):
        raise TypeError(
            f"model must be one of create_model(), got a {type(model).__name__} "
            "(for features_only, explain the model inside)"
        )
    config: Any = model.pretrained_cfg
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        raise ValueError(f"model must be on the CPU to be explained, it is on {weight.device}")
    batch = whole(1, _MOST_IMAGES)("batch_size", batch_size)
    shape = (batch, *_image_shape(model.in_chans, input_size, config["input_size"]))
    repeats = whole(1, _MOST_REPEATS)("repeats", repeats)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator, device="cpu").to(weight.dtype)
    try:
        with _in_evaluation(model):
            found = profile(model, images, repeats)
    except RuntimeError as error:
        if "greater than actual input" not in str(error):
            raise
        raise ValueError(f"images of {shape[2]}×{shape[3]} are too small: {error}") from error
    return Explanation(
        config.get("architecture", type(model).__name__),
        shape,
        str(weight.dtype).removeprefix("torch."),
        torch.get_num_threads(),
        instruction_set(),
        model.fused,
        found.seconds,
        found.calls,
        _memory_of(found),
        found.obstacle,
    )


def _image_shape(
    channels: int, size: int | Sequence[int] | None, default: Sequence[int]
) -> tuple[int, ...]:
    if size is None:
        return channels, *default[1:]
    side = whole(1, _LARGEST_SIDE)
    if not isinstance(size, Sequence):
        return channels, *[side("input_size", size)] * 2
    if len(size) not in (2, 3):
        raise ValueError(
            f"input_size must be a side, (H, W) or ({channels}, H, W), got {shown(size)}"
        )
    *given, height, width = several(side)("input_size", size)
    if given not in ([], [channels]):
        raise ValueError(f"the model takes images of {channels} channels, got {shown(size)}")
    return channels, height, width


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, no module trains; afterwards those do that did before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _memory_of(found: Profile) -> MemoryUse | None:
    if found.graph is None or found.plan is None:
        return None
    buffers = [
        BufferUse(use.first, use.last, found.plan.offsets.get(i), buffer.nbytes, buffer.size)
        for i, (buffer, use) in enumerate(zip(found.graph.buffers, found.plan.uses, strict=True))
        if use.last >= use.first
    ]
    return MemoryUse(found.plan.nbytes, buffers)


def _rate(call: TracedCall) -> float | None:
    """GFLOP/s."""
    return None if call.flops is None or not call.seconds else call.flops / call.seconds / 1e9


def _sides(shapes: Sequence[Sequence[int]]) -> str:
    return "×".join(map(str, shapes[0])) if shapes else ""


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
