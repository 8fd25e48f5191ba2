"""Fuzzing: corrupted checkpoints raise a documented error or load unchanged."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import damage, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor
from zoo import FAMILIES, Mould, images, randomise, small

from backbones import CheckpointError, load_checkpoint
from backbones.van import VAN
from ops.cpu.gemm.int8 import not_faster_in_int8

pytestmark = pytest.mark.slow


def _model() -> VAN:
    return VAN(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=2)


STATE = {k: v.clone() for k, v in randomise(_model()).state_dict().items()}
for name, tensor in STATE.items():
    if name.endswith("num_batches_tracked"):
        tensor += 7


def _saved(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": STATE, "epoch": 3}, buffer, **options)
    return buffer.getvalue()


ZIP = _saved()
LEGACY = _saved(_use_new_zipfile_serialization=False)
SAFETENSORS = save(STATE, {"model": "van"})
HEADER = 8 + int.from_bytes(SAFETENSORS[:8], "little")


class Target:
    """One model that is loaded again and again, and must be as before where that fails."""

    def __init__(self, folder: Path) -> None:
        self.model = _model().eval()
        self.path = folder / "spoilt"
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        for tensor in self.model.state_dict().values():
            tensor.zero_()

    def load(self, data: bytes) -> bool:
        """Whether ``data`` was taken for a checkpoint; else a CheckpointError must say no."""
        self.path.write_bytes(data)
        try:
            load_checkpoint(self.model, self.path)
        except CheckpointError as error:
            assert "\n" not in str(error) and "weights_only" not in str(error)
            assert not any(tensor.any() for tensor in self.model.state_dict().values())
            return False
        return True

    def check(self, data: bytes, checked: bool = True) -> None:
        """Refused, or loaded as it was saved, if checksums or the structure tell any damage."""
        if self.load(data):
            state = self.model.state_dict()
            assert not checked or all(torch.equal(state[name], STATE[name]) for name in STATE)
            self.clear()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    target = Target(tmp_path_factory.mktemp("fuzz"))
    for data in (ZIP, LEGACY, SAFETENSORS):
        assert target.load(data)
        target.check(data)
    return target


def _repacked(change: Callable[[bytes], bytes]) -> bytes:
    """The zip with another pickle, and valid checksums: somebody meant it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIP)) as source, zipfile.ZipFile(buffer, "w") as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = change(content)
            archive.writestr(info.filename, content)
    return buffer.getvalue()


def _with_another_header(change: Callable[[bytes], bytes]) -> bytes:
    return change(SAFETENSORS[:HEADER]) + SAFETENSORS[HEADER:]


# Whether any damage can be told: what a flipped bit makes of a weight is a weight.
KINDS: dict[str, tuple[Callable[[Callable[[bytes], bytes]], bytes], bool]] = {
    "zip": (lambda change: change(ZIP), True),
    "header of safetensors": (_with_another_header, True),
    "legacy": (lambda change: change(LEGACY), False),
    "pickle": (_repacked, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, target: Target) -> None:
    spoilt, checked = KINDS[kind]

    @fuzz(300)
    @given(damage())
    def check(change: Callable[[bytes], bytes]) -> None:
        target.check(spoilt(change), checked)

    check()


SPOILT: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "text": lambda t: "x",
    "list": lambda t: t.flatten()[:3].tolist(),
    "number": lambda t: 3,
    "mapping": lambda t: {"weight": t},
    "whole numbers": lambda t: t.to(torch.int64),
    "truth values": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "double": lambda t: t.double(),
    "scalar": lambda t: t.new_zeros(()),
    "empty": lambda t: t.new_zeros(0),
    "flat": lambda t: t.flatten(),
    "axis": lambda t: t[None],
    "last axis": lambda t: t[..., None],
    "turned": lambda t: t.permute(tuple(reversed(range(t.ndim)))),
    "long": lambda t: torch.cat([t, t]) if t.ndim else t,
    "nan": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}
NAMES = ("", ".", "x", "module.", "backbone.", "layers.0.weight", "\n", "head.weight", 3, None)


StateEdit = tuple[str, Any, str]


def state_edits(state: dict[str, Tensor]) -> st.SearchStrategy[list[StateEdit]]:
    """Names of a tensor, of another or of nobody's, and what is done with the tensor."""
    names = st.sampled_from(sorted(state))
    others = st.one_of(names, st.sampled_from(NAMES))
    ways = st.sampled_from([*SPOILT, "left out", "renamed", "swapped"])
    return st.lists(st.tuples(names, others, ways), min_size=1, max_size=3)


def spoil_state(state: dict[str, Tensor], edits: list[StateEdit]) -> dict[Any, Any]:
    spoilt: dict[Any, Any] = dict(state)
    for name, other, how in edits:
        if how in SPOILT:
            spoilt[name] = SPOILT[how](state[name])
        elif how == "swapped":
            spoilt[name], spoilt[other] = spoilt.get(other), spoilt.get(name)
        elif name in spoilt:
            tensor = spoilt.pop(name)
            if how == "renamed":
                spoilt[other] = tensor
    return spoilt


@pytest.mark.usefixtures("small_layers_too")
@pytest.mark.parametrize("family", [*FAMILIES, "in int8"])
def test_corrupted_states_of_every_family(family: str) -> None:
    """Whatever fails, the model is as before; in int8, whatever loads can run."""
    x, in_int8 = images(2, 3, 64, 64), family == "in int8"
    mould = Mould(randomise(small("shvit" if in_int8 else family)).eval())
    model, before = mould.copy(), mould.copy().state_dict()
    given_state = before
    if in_int8 and not_faster_in_int8(x.device) is None:
        given_state = dict(mould.copy().fuse(torch.int8, calibrate=x).int8_state_dict())

    @fuzz(200 if in_int8 else 60)
    @given(state_edits(given_state), st.booleans())
    def check(edits: list[StateEdit], strict: bool) -> None:
        nonlocal model
        try:
            load_checkpoint(model, spoil_state(given_state, edits), strict)
        except CheckpointError as error:
            assert "\n" not in str(error)
            now = model.state_dict()
            assert all(torch.equal(now[name], before[name]) for name in before)
            return
        if in_int8:
            with torch.inference_mode():
                assert model(x.to(next(model.parameters()).dtype)).shape == (2, 1000)
        model = mould.copy()

    check()
