"""The public functions: bad arguments, backend selection, autocast and compilation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ops.neighborhood import (
    BACKENDS,
    cpu,
    na1d,
    na2d,
    natten,
    tiled,
    triton,
)
from ops.neighborhood._geometry import NAParams
from ops.neighborhood.functional import _best_backend


def _tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


BAD_PARAMETERS = {
    "window larger than the map": ({"kernel_size": 7}, r"7 · 1 = 7 > 6 along axis 1"),
    "dilated window larger than the map": (
        {"kernel_size": (3, 2), "dilation": (3, 1)},
        r"3 · 3 = 9 > 8 along axis 0",
    ),
    "stride above the kernel": ({"kernel_size": 3, "stride": (1, 4)}, r"4 > 3 along axis 1"),
    "kernel of 0": ({"kernel_size": 0}, r"kernel_size .* got 0"),
    "kernel not an integer": ({"kernel_size": 3.0}, r"kernel_size .* got 3\.0"),
    "kernel a bool": ({"kernel_size": True}, r"kernel_size .* got True"),
    "kernel of the wrong length": ({"kernel_size": (3, 3, 3)}, r"kernel_size .* 2 axes"),
    "kernel a string": ({"kernel_size": "33"}, r"kernel_size .* got '33'"),
    "negative stride": ({"kernel_size": 3, "stride": -1}, r"stride .* got -1"),
    "dilation not an integer": ({"kernel_size": 3, "dilation": (1, 1.5)}, r"dilation .* 1\.5"),
    "causal not a bool": ({"kernel_size": 3, "is_causal": 1}, r"is_causal .* got 1"),
    "causal of the wrong length": ({"kernel_size": 3, "is_causal": (True,)}, r"is_causal .* 2"),
    "scale not a number": ({"kernel_size": 3, "scale": "1"}, r"scale .* got '1'"),
    "unknown backend": ({"kernel_size": 3, "backend": "fna"}, r"reference, tiled, .* got 'fna'"),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_refuses_parameters(name: str) -> None:
    parameters, message = BAD_PARAMETERS[name]
    with pytest.raises(ValueError, match=message):
        na2d(*_tensors(1, 8, 6, 2, 4), **parameters)


def _shape(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


BAD_TENSORS = {
    "rank of query": ({"query": _shape(1, 6, 2, 4)}, r"query must be \(batch, height, width"),
    "rank of value": ({"value": _shape(1, 6, 2, 4)}, r"value must be .* got \(1, 6, 2, 4\)"),
    "dtype of key": ({"key": _shape(1, 6, 6, 2, 4, dtype=torch.float16)}, "key .* torch.float16"),
    "integers": ({"query": _shape(1, 6, 6, 2, 4, dtype=torch.int32)}, "query .* torch.int32"),
    "device": ({"value": _shape(1, 6, 6, 2, 4, device="meta")}, "value .* on meta"),
    "map of key": ({"key": _shape(1, 6, 5, 2, 4)}, r"agree in batch and map, .* \(1, 6, 5, 2, 4\)"),
    "batch of value": ({"value": _shape(2, 6, 6, 2, 4)}, r"agree in batch and map"),
    "dim of key": ({"key": _shape(1, 6, 6, 2, 3)}, "same dim, got 4 and 3"),
    "heads of key and value": ({"key": _shape(1, 6, 6, 1, 4)}, "same heads, got 1 and 2"),
    "fewer heads of value": ({"value": _shape(1, 6, 6, 1, 4)}, "same heads, got 2 and 1"),
    "heads that do not divide": ({"query": _shape(1, 6, 6, 3, 4)}, "divide .* got 2 and 3"),
    "keys alone": ({"additional_keys": _shape(1, 5, 2, 4)}, "both or neither"),
    "rank of additional keys": (
        {"additional_keys": _shape(1, 2, 4), "additional_values": _shape(1, 5, 2, 4)},
        r"additional_keys must be \(1, any number, 2, 4\), got \(1, 2, 4\)",
    ),
    "batch of additional values": (
        {"additional_keys": _shape(1, 5, 2, 4), "additional_values": _shape(2, 5, 2, 4)},
        "additional_values must be",
    ),
    "dtype of additional keys": (
        {
            "additional_keys": _shape(1, 5, 2, 4, dtype=torch.float64),
            "additional_values": _shape(1, 5, 2, 4),
        },
        "additional_keys .* torch.float64",
    ),
    "number of additional values": (
        {"additional_keys": _shape(1, 5, 2, 4), "additional_values": _shape(1, 4, 2, 4)},
        "equally many, got 5 and 4",
    ),
    "shape of rpb": ({"rpb": _shape(2, 5, 3)}, r"rpb .* \(2, 5, 5\), got \(2, 5, 3\)"),
    "dtype of rpb": ({"rpb": _shape(2, 5, 5, dtype=torch.int64)}, "rpb .* torch.int64"),
    "device of rpb": ({"rpb": _shape(2, 5, 5, device="meta")}, "rpb .* on meta"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_refuses_tensors(name: str) -> None:
    tensors, message = BAD_TENSORS[name]
    good = {name: _shape(1, 6, 6, 2, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        na2d(**{**good, **tensors}, kernel_size=3)


def test_takes_sequences_of_any_kind() -> None:
    tensors = _tensors(1, 8, 6, 2, 4)
    true = na2d(*tensors, (3, 5), is_causal=(True, False))
    assert true.equal(na2d(*tensors, [3, 5], is_causal=[True, False]))
    assert true.equal(na2d(*tensors, torch.Size((3, 5)), stride=[1, 1], is_causal=(True, False)))
    tensors = _tensors(1, 8, 2, 4)
    assert na1d(*tensors, 3).equal(na1d(*tensors, (3,), (1,), (1,), (False,)))
    assert na1d(*tensors, 3).equal(na1d(*tensors, 3, is_causal=None))


def test_backend_order_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    params = NAParams((3,), (1,), (1,), (False,), 0.5)
    call = (*_tensors(1, 8, 2, 4), None, None, None)
    monkeypatch.setattr(cpu, "unavailable", lambda *_: None)
    assert _best_backend(call, params) is cpu
    monkeypatch.setattr(cpu, "unavailable", lambda *_: "no compiler")
    assert _best_backend(call, params) is tiled


def test_backend_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    params = NAParams((3,), (1,), (1,), (False,), 0.5)
    call = (SimpleNamespace(device=torch.device("cuda")), None, None, None, None, None)
    monkeypatch.setattr(natten, "is_fused", lambda *_: True)
    monkeypatch.setattr(natten, "unavailable", lambda *_: None)
    monkeypatch.setattr(triton, "unavailable", lambda *_: None)
    assert _best_backend(call, params) is natten
    monkeypatch.setattr(natten, "unavailable", lambda *_: "no bias")
    assert _best_backend(call, params) is triton
    monkeypatch.setattr(natten, "unavailable", lambda *_: None)
    monkeypatch.setattr(natten, "is_fused", lambda *_: False)
    assert _best_backend(call, params) is triton
    monkeypatch.setattr(triton, "unavailable", lambda *_: "too old")
    assert _best_backend(call, params) is tiled


def test_unsupported_calls_fall_back_to_tiled() -> None:
    tensors = _tensors(1, 8, 6, 2, 4, dtype=torch.float64)
    assert na2d(*tensors, 3).equal(na2d(*tensors, 3, backend="tiled"))


def test_windows_of_the_whole_map_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors(2, 8, 6, 2, 4)
    extra = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 4)
    whole = {"kernel_size": (8, 6), "stride": (2, 3), "scale": 0.3}
    more = {"additional_keys": extra[0], "additional_values": extra[1]}
    plain = na2d(*tensors, **whole, backend="reference")
    with_extra = na2d(*tensors, **whole, **more, backend="reference")
    for module in BACKENDS.values():
        monkeypatch.delattr(module, "attend")
    torch.testing.assert_close(na2d(*tensors, **whole), plain)
    torch.testing.assert_close(na2d(*tensors, **whole, **more), with_extra)
    for other in ({"is_causal": (False, True)}, {"rpb": _shape(2, 15, 11)}, {"return_lse": True}):
        with pytest.raises(AttributeError, match="attend"):
            na2d(*tensors, **whole, **other)


def test_a_forced_backend_says_why_it_cannot() -> None:
    tensors = _tensors(1, 8, 2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot do this call: .*float64"):
        na1d(*tensors, 3, backend="cpu")
