"""``explain()``: which kernel runs each layer of a model, why, and how fast."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from backbones.common.checks import several, whole
from backbones.common.messages import shown
from backbones.common.tables import table
from backbones.fusing.fuse import FusableBackbone
from backbones.fusing.int8_state import Int8Model, Precision
from ops.cpu.build import instruction_set
from ops.fuse.replayed import Replayed
from ops.rewriting.profile import Profile, TracedCall, profile

__all__ = ["BufferUse", "Explanation", "MemoryUse", "explain"]

_LARGEST_SIDE = 1 << 16
_MOST_IMAGES = 1 << 16
_MOST_REPEATS = 10**6


@dataclass
class BufferUse:
    """A buffer between calls.

    Attributes:
        first, last: indices of the first and last call that use it. The input exists before the
            first call (-1), and the result outlives the last one.
        offset: in the workspace, in bytes; None for buffers elsewhere: the input, the result and
            those allocated by torch.
        nbytes: size in bytes.
        shape: of the tensor it was allocated for.
    """

    first: int
    last: int
    offset: int | None
    nbytes: int
    shape: tuple[int, ...]


@dataclass
class MemoryUse:
    """The memory plan of a replayed model.

    Attributes:
        nbytes: size of the shared workspace.
        buffers: all buffers.
    """

    nbytes: int
    buffers: list[BufferUse] = field(repr=False)

    @property
    def planned(self) -> list[BufferUse]:
        """The buffers in the workspace."""
        return [buffer for buffer in self.buffers if buffer.offset is not None]

    @property
    def reuse(self) -> float:
        """Total size of the workspace's buffers relative to the workspace."""
        total = sum(buffer.nbytes for buffer in self.planned)
        return total / self.nbytes if self.nbytes else 1.0

    @property
    def peak(self) -> int:
        """The maximum number of bytes that are live at a time."""
        starts = {buffer.first for buffer in self.planned}
        return max(
            (sum(b.nbytes for b in self.planned if b.first <= now <= b.last) for now in starts),
            default=0,
        )


@dataclass
class Explanation:
    """The result of :func:`explain`; ``print`` shows it as a table.

    Attributes:
        model: the architecture's name.
        input_shape: (B, C, H, W).
        dtype: of parameters and images.
        threads: of torch.
        instruction_set: used by the kernels and the policy's rules.
        is_fused: whether layers have their inference forms.
        seconds: median time of one call of the model.
        calls: kernels and functions in execution order, see
            :class:`ops.rewriting.profile.TracedCall`.
        memory: the memory plan if the model is replayed, else None.
        not_replayed: why a fused model is not replayed; None if it is.
        doors: how each kind of call ran so far, of the model and of the networks inside: recorded,
            through Dynamo, or plainly and why.
        precision: after ``fuse(torch.int8)``, its layers and their precision, else None.
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
    precision: Precision | None = None
    doors: list[str] = field(default_factory=list, repr=False)

    @property
    def between(self) -> float:
        """Seconds spent between the calls, in Python."""
        return max(0.0, self.seconds - sum(call.seconds for call in self.calls))

    def share(self, seconds: float) -> float:
        """Fraction of the total time; the shares of all calls and of ``between`` add up to 1."""
        return seconds / (self.between + sum(call.seconds for call in self.calls) or 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The explanation in JSON-compatible types."""
        made = {**asdict(self), "between": self.between, "calls": []}
        for call in self.calls:
            found = {k: v for k, v in vars(call).items() if k not in _NOT_TOLD}
            found |= {"rule": call.rule, "share": self.share(call.seconds)}
            made["calls"].append({**found, "gflops_per_second": _rate(call)})
        if self.memory is not None:
            made["memory"] |= {"peak": self.memory.peak, "reuse": self.memory.reuse}
        told: dict[str, Any] = json.loads(json.dumps(made))  # with lists for tuples
        return told

    def __str__(self) -> str:
        """A table with a row for each call, and a summary of the memory plan."""
        rows = [
            [
                call.layer or "(model)",
                call.kernel if call.library == "ours" else f"{call.library} {call.kernel}",
                " → ".join(_sides(*shapes[:1]) for shapes in (call.inputs, call.outputs)),
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
        rows.append([*last, f"{flops / self.seconds / 1e9:.1f}" if self.seconds else "", ""])
        text = table(_HEAD, rows, left=5, last_left=True)
        return f"{self._title()}\n\n{text}\n{self._notes()}\n"

    def _times(self, seconds: float) -> tuple[str, str]:
        return f"{1e3 * seconds:.3f}", f"{100 * self.share(seconds):.1f} %"

    def _title(self) -> str:
        form = "fused" if self.is_fused else "not fused"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        size = _sides(self.input_shape)
        return f"{self.model}, {form}: {size} {self.dtype}, {threads}, {self.instruction_set}"

    def _notes(self) -> str:
        lines = [
            "Rows without a rule have no alternative. GFLOP/s: convolutions and matrix products, "
            "where counted."
        ]
        memory, precision = self.memory, self.precision
        if precision is not None:
            lines.append(f"{precision.summary()}.")
            lines += [
                f"  {layer.layer} is in {layer.dtype}: {layer.reason}"
                for layer in precision.layers
                if layer.reason and layer.reason != precision.reason
            ]
        if self.not_replayed is not None:
            lines.append(f"Not replayed, runs layer by layer: {self.not_replayed}.")
        lines += [f"Call of {door}." for door in self.doors]
        if memory is not None:
            total = sum(buffer.nbytes for buffer in memory.planned)
            lines.append(
                f"Memory: {len(memory.planned)} buffers ({_mebibytes(total)} in total) share a "
                f"workspace of {_mebibytes(memory.nbytes)} (reuse {memory.reuse:.1f}×), of which "
                f"at most {_mebibytes(memory.peak)} are live at a time."
            )
        return "\n".join(lines)


_NOT_TOLD = ("rules", "lowered_from", "rewrites")  # which ``rule`` puts into words
_HEAD = ("layer", "kernel", "shapes", "dtype", "set", "ms", "share", "GFLOP/s", "rule")


def explain(
    model: nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    batch_size: int = 1,
    repeats: int = 10,
) -> Explanation:
    """List the kernels and torch functions that run a model, why each was chosen, and its time.

    The model is explained as it is; fuse it first to see the effect of :func:`backbones.fuse`. If
    it is replayed, the times are those of replays. It is called a few times in eval and inference
    mode and left unchanged. With one thread, CPU time is measured, so that other processes don't
    affect the result.

    Args:
        model: of :func:`backbones.create_model`, of timm, or any other that takes images, on the
            CPU.
        input_size: image size: a side, (H, W) or (C, H, W); default: the model's, if it declares
            one. Of others, only the calls so far are explained.
        batch_size: number of images.
        repeats: number of calls to take median times over.

    Returns:
        :class:`backbones.Explanation`: ``print`` it, or use its ``calls`` and ``memory``.

    Raises:
        TypeError: ``model`` is no module, or a number is of another type.
        ValueError: the model is not on the CPU, or size, batch or repeats are out of range.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got a {type(model).__name__}")
    weight = next(model.parameters(), torch.empty(0))
    if weight.device.type != "cpu":
        raise ValueError(f"model must be on the CPU to be explained, but is on {weight.device}")
    batch = whole(1, _MOST_IMAGES)("batch_size", batch_size)
    repeats = whole(1, _MOST_REPEATS)("repeats", repeats)
    doors = _doors(model)
    shape: tuple[int, ...] = ()
    if isinstance(config, Mapping) or input_size is not None:
        shape = (batch, *_image_shape(config, model, input_size))
        found = _profile(model, shape, weight.dtype, repeats)
        doors = found.doors or doors
    else:
        found = Profile([], 0.0, obstacle=None if doors else "it has not been called yet")
    is_fused = model.fused if isinstance(model, FusableBackbone) else isinstance(model, Replayed)
    obstacle = found.obstacle
    if is_fused and not isinstance(model, Replayed):
        obstacle = "its layers are those of torch, not in channels last"
    return Explanation(
        (config or {}).get("architecture", type(model).__name__),
        shape,
        str(weight.dtype).removeprefix("torch."),
        torch.get_num_threads(),
        instruction_set(),
        is_fused,
        found.seconds,
        found.calls,
        _memory_of(found),
        obstacle,
        model.precision if isinstance(model, Int8Model) else None,
        doors,
    )


def _doors(model: nn.Module) -> list[str]:
    """How each kind of call of a model, and of networks inside, ran so far."""
    return [
        f"{name or 'the model'}, {door}"
        for name, module in model.named_modules()
        if isinstance(module, Replayed)
        for door in module.doors
    ]


def _profile(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> Profile:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator, device="cpu").to(dtype)
    try:
        return profile(model, images, repeats, _doors)
    except RuntimeError as error:
        if "greater than actual input" not in str(error):
            raise
        raise ValueError(f"images of {shape[2]}×{shape[3]} are too small: {error}") from error


def _image_shape(
    config: Any, model: nn.Module, size: int | Sequence[int] | None
) -> tuple[int, ...]:
    if isinstance(config, Mapping):
        default = config["input_size"]
    else:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        default = (3 if first is None else first.in_channels,)
    channels = int(getattr(model, "in_chans", default[0]))
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
        raise ValueError(f"the model expects images of {channels} channels, got {shown(size)}")
    return channels, height, width


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


def _sides(shape: Sequence[int] = ()) -> str:
    return "×".join(map(str, shape))


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
