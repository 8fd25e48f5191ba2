"""The public functions: their arguments, and which backend computes a call."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

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
from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.functional import _best_backend


def _tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def test_takes_sequences_of_any_kind() -> None:
    tensors = _tensors(1, 8, 6, 2, 4)
    true = na2d(*tensors, (3, 5), is_causal=(True, False))
    assert true.equal(na2d(*tensors, [3, 5], is_causal=[True, False]))
    assert true.equal(na2d(*tensors, torch.Size((3, 5)), stride=[1, 1], is_causal=(True, False)))
    tensors = _tensors(1, 8, 2, 4)
    assert na1d(*tensors, 3).equal(na1d(*tensors, (3,), (1,), (1,), (False,)))
    assert na1d(*tensors, 3).equal(na1d(*tensors, 3, is_causal=None))


PARAMS = NAParams((3,), (1,), (1,), (False,), 0.5)


def _on(device: str) -> Inputs:
    query: Any = SimpleNamespace(device=torch.device(device))
    return Inputs(query, query, query)


def test_backend_order_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, expected in ((None, cpu), ("no compiler", tiled)):
        monkeypatch.setattr(cpu, "unavailable", lambda *_, r=reason: r)
        assert _best_backend(_on("cpu"), PARAMS) is expected


@pytest.mark.parametrize(
    ("is_fused", "of_natten", "of_triton", "expected"),
    [
        (True, None, None, natten),
        (True, "no bias", None, triton),
        (False, None, None, triton),
        (False, None, "too old", tiled),
    ],
)
def test_backend_order_on_a_gpu(
    is_fused: bool,
    of_natten: str | None,
    of_triton: str | None,
    expected: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(natten, "is_fused", lambda *_: is_fused)
    monkeypatch.setattr(natten, "unavailable", lambda *_: of_natten)
    monkeypatch.setattr(triton, "unavailable", lambda *_: of_triton)
    assert _best_backend(_on("cuda"), PARAMS) is expected


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
    for other in (
        {"is_causal": (False, True)},
        {"rpb": torch.zeros(2, 15, 11)},
        {"return_lse": True},
    ):
        with pytest.raises(AttributeError, match="attend"):
            na2d(*tensors, **whole, **other)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"device": "meta"}, "meta"),
        ({"size": (1, 8, 2, 513)}, "513"),
    ],
)
def test_a_forced_backend_says_why_it_cannot(call: dict[str, Any], reason: str) -> None:
    whole = torch.zeros(**{"size": (1, 8, 2, 4), **call})
    for query, value in ((whole, whole[..., :4]), (whole[..., :4], whole)):
        with pytest.raises(NotImplementedError, match=rf"'cpu' cannot do this call: .*{reason}"):
            na1d(query, query, value, 3, backend="cpu")
