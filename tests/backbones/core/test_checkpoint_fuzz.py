"""Fuzzing: corrupted checkpoints raise a documented error or load unchanged."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor
from zoo import FAMILIES, images, randomise, small

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

    def check(self, data: bytes) -> None:
        """Refused, or loaded as it was saved."""
        if self.load(data):
            state = self.model.state_dict()
            assert all(torch.equal(state[name], STATE[name]) for name in STATE)
            self.clear()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    target = Target(tmp_path_factory.mktemp("fuzz"))
    for data in (ZIP, LEGACY, SAFETENSORS):
        assert target.load(data)
        target.check(data)
    return target


def cases(count: int) -> Any:
    return settings(
        max_examples=count,
        deadline=5000,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


Edit = tuple[str, list[tuple[int, int]]]


def edits(low: int, high: int) -> st.SearchStrategy[Edit]:
    """Bytes changed, left out, doubled or cut off between two places of a file."""
    place = st.integers(low, high - 1)
    change = st.tuples(place, st.integers(1, 255))
    flip = st.tuples(place, st.sampled_from([1 << bit for bit in range(8)]))
    ends = st.lists(st.tuples(place, place), min_size=1, max_size=1)
    return st.one_of(
        st.tuples(st.just("change"), st.lists(change, min_size=1, max_size=4)),
        st.tuples(st.just("change"), st.lists(flip, min_size=1, max_size=1)),
        st.tuples(st.sampled_from(["cut", "double", "end"]), ends),
    )


def spoil(data: bytes, edit: Edit) -> bytes:
    kind, places = edit
    if kind == "change":
        result = bytearray(data)
        for where, bits in places:
            result[where] ^= bits
        return bytes(result)
    first, last = sorted(places[0])
    return {
        "cut": data[:first] + data[last:],
        "double": data[:last] + data[first:],
        "end": data[:first],
    }[kind]


def _members() -> list[tuple[int, int]]:
    """Where in the zip the content of each member begins and ends."""
    places = []
    for info in zipfile.ZipFile(io.BytesIO(ZIP)).infolist():
        lengths = struct.unpack_from("<HH", ZIP, info.header_offset + 26)
        start = info.header_offset + 30 + sum(lengths)
        places.append((start, start + info.file_size))
    return places


MEMBERS = _members()
DIRECTORY = ZIP.index(b"PK\x01\x02", MEMBERS[-1][1])
HEADERS = [
    place
    for (_, end), (start, _) in zip(MEMBERS, MEMBERS[1:], strict=False)
    for place in range(end, start)
]


def _spoilt(data: bytes, low: int, high: int) -> st.SearchStrategy[bytes]:
    return edits(low, high).map(lambda edit: spoil(data, edit))


def _swapped(pair: tuple[tuple[int, int], tuple[int, int]]) -> bytes:
    (a, b), (c, d) = sorted(pair)
    return ZIP if a == c else ZIP[:a] + ZIP[c:d] + ZIP[b:c] + ZIP[a:b] + ZIP[d:]


def _repacked(edit: Edit) -> bytes:
    """With another pickle, and valid checksums: somebody meant it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIP)) as source, zipfile.ZipFile(buffer, "w") as archive:
        for info in source.infolist():
            is_pickle = info.filename.endswith("data.pkl")
            archive.writestr(info.filename, spoil(PICKLE, edit) if is_pickle else source.read(info))
    return buffer.getvalue()


PICKLE = zipfile.ZipFile(io.BytesIO(ZIP)).read("archive/data.pkl")
MEMBER = st.sampled_from(MEMBERS)
CHECKED = {
    "zip": _spoilt(ZIP, 0, len(ZIP)),
    "directory of a zip": _spoilt(ZIP, DIRECTORY, len(ZIP)),
    "headers of members": st.tuples(st.sampled_from(HEADERS), st.integers(1, 255)).map(
        lambda change: spoil(ZIP, ("change", [change]))
    ),
    "swapped members": st.tuples(MEMBER, MEMBER).map(_swapped),
    "header of safetensors": _spoilt(SAFETENSORS, 0, HEADER),
}
UNCHECKED = {
    "legacy": _spoilt(LEGACY, 0, len(LEGACY)),
    "pickle": edits(0, len(PICKLE)).map(_repacked),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_files_with_checksums(kind: str, target: Target) -> None:
    cases(200)(given(CHECKED[kind])(target.check))()


@cases(50)
@given(end=st.integers(0, len(LEGACY) - 1), legacy=st.booleans())
def test_truncated_files(target: Target, end: int, legacy: bool) -> None:
    data = LEGACY if legacy else SAFETENSORS
    assert not target.load(data[: end % len(data)])


@pytest.mark.parametrize("kind", UNCHECKED)
def test_files_without_checksums(kind: str, target: Target) -> None:
    """Only their structure can be wrong: what a flipped bit makes of a weight is a weight."""

    def load(data: bytes) -> None:
        if target.load(data):
            target.clear()

    cases(150)(given(UNCHECKED[kind])(load))()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_corrupted_states_of_every_family(family: str) -> None:
    """Whatever fails, the model is as before."""
    model = randomise(small(family))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @cases(60)
    @given(state_edits(state), st.booleans())
    def check(edits: list[StateEdit], strict: bool) -> None:
        try:
            load_checkpoint(model, spoil_state(state, edits), strict)
        except CheckpointError as error:
            assert "\n" not in str(error)
            now = model.state_dict()
            assert all(torch.equal(now[name], state[name]) for name in state)
        else:
            model.load_state_dict(state)

    check()


# -- in int8 -----------------------------------------------------------------------------------
IMAGES = images(2, 3, 64, 64)
_REASON = not_faster_in_int8(torch.device("cpu"))
_needs_int8 = pytest.mark.skipif(_REASON is not None, reason=f"{_REASON}")


@pytest.fixture(scope="module")
def in_int8(small_layers_too: None) -> dict[str, Tensor]:
    """The state of a model of which layers compute in int8, with their ranges."""
    model = randomise(small("shvit")).eval().fuse(torch.int8, calibrate=IMAGES)
    return dict(model.int8_state_dict())


def load_in_int8(source: Any, strict: bool = True) -> bool:
    """Whether a new model took ``source``; else an error says why in one line.

    Where it did, the numbers of its layers are possible ones, and it runs.
    """
    model = small("shvit").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_checkpoint(model, source, strict)
    except CheckpointError as error:
        assert "\n" not in str(error)
        now = model.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
        return False
    for module in model.modules():
        quantization = getattr(module, "quantization", None)
        if quantization is not None and quantization.in_range is not None:
            scale, zero = quantization.in_range
            assert scale >= torch.finfo(torch.float32).tiny and zero in range(256)
    with torch.inference_mode():
        assert model(IMAGES.to(next(model.parameters()).dtype)).shape == (2, 1000)
    return True


@_needs_int8
@cases(300)
@given(data=st.data())
def test_files_and_states_in_int8(
    in_int8: dict[str, Tensor], tmp_path_factory: Any, data: Any
) -> None:
    content = save(in_int8)
    header = 8 + int.from_bytes(content[:8], "little")
    edit = data.draw(st.one_of(edits(0, header), edits(header, len(content))))
    path = tmp_path_factory.getbasetemp() / "spoilt-int8.safetensors"
    path.write_bytes(spoil(content, edit))
    load_in_int8(path)
    load_in_int8(spoil_state(in_int8, data.draw(state_edits(in_int8))), data.draw(st.booleans()))
