"""What ``calibrate`` may give: whatever a model's call takes, or batches of it.

The guide to int8 (``docs/guides/eight_bits.md``) says which call each kind of value stands for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones.common.messages import first_line, shown
from backbones.fusing.types import converted, tensors

__all__ = ["Call", "readings"]


class Call(NamedTuple):
    """The arguments of a call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        args, kwargs = converted(self, _Size)
        return ", ".join([*map(shown, args), *(f"{k}={shown(v)}" for k, v in kwargs.items())])

    def to_model(self, model: nn.Module) -> Call:
        """On the device and in the floating-point type of a model's parameters."""
        weight = next(model.parameters())

        def change(t: Tensor) -> Tensor:
            return t.to(weight.device, weight.dtype if t.is_floating_point() else None)

        call: Call = converted(self, change)
        return call

    def checked(self, model: nn.Module, name: str) -> Call:
        """:meth:`to_model`, of tensors with plain, finite values.

        Raises:
            ValueError: others, or none.
        """
        found = tensors(self)
        if not any(t.numel() for t in found):
            kind = type(model).__name__
            raise ValueError(f"{name} has no values that {kind} could take, got {self}")
        for t in found:
            if t.is_nested or t.layout != torch.strided or t.is_meta:
                kind = "nested" if t.is_nested else f"{t.layout} on {t.device}"
                raise ValueError(f"{name} has a tensor without plain values ({kind})")
        call = self.to_model(model)
        for t in tensors(call):
            if t.is_floating_point() and not (t < torch.inf).all():  # masks may have -inf
                raise ValueError(f"{name} has NaN or values infinite in {t.dtype}")
        return call

    def run(self, model: nn.Module) -> Any:
        """The result of the call.

        Raises:
            ValueError: the model does not take these arguments.
        """
        try:
            return model(*self.args, **self.kwargs)
        except _REFUSALS as error:
            raise ValueError(
                f"{type(model).__name__} does not accept {self}, with which fuse() called it; pass "
                f"other inputs as calibrate=…: {first_line(error)}"
            ) from error


_REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Size:
    """What messages show of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._text = f"{tuple(tensor.shape)} of {tensor.dtype}"

    def __repr__(self) -> str:
        return self._text


def readings(calibrate: Iterable[Any] | Tensor, model: nn.Module) -> list[list[Call]]:
    """The calls that ``calibrate`` may stand for, most likely first.

    Only lists and tuples may stand for several: of batches, of images, or of arguments.

    Raises:
        ValueError: there are no batches.
    """
    forward = _Forward(model)
    if isinstance(calibrate, Tensor | Mapping):
        return [[forward.call(calibrate)]]
    batches = [*calibrate]
    if not batches:
        raise ValueError("calibrate must give at least one batch, got none")
    if forward.requires(batches):
        return [[Call(tuple(batches), {})]]
    found = [[forward.call(batch) for batch in batches]]
    if any(isinstance(batch, list | tuple) for batch in batches):
        found.append([forward.call(batch, otherwise=True) for batch in batches])
    elif isinstance(calibrate, list | tuple):
        found.append([Call((calibrate,), {})])
    return found


class _Forward:
    """The parameters of a model's ``forward()``."""

    def __init__(self, model: nn.Module) -> None:
        try:
            self._signature = inspect.signature(model.forward)
        except (TypeError, ValueError):  # of TorchScript
            self._signature = inspect.signature(lambda *args, **kwargs: None)
        found = self._signature.parameters.values()
        positional = [p for p in found if p.kind <= p.POSITIONAL_OR_KEYWORD]
        self._required = sum(p.default is p.empty for p in positional)
        has_more = any(p.kind == p.VAR_POSITIONAL for p in found)
        self._most = None if has_more else len(positional)

    def requires(self, items: Sequence[Any]) -> bool:
        """Whether these are several tensors, none of which makes a call without the others."""
        return len(items) == self._required > 1 and all(isinstance(i, Tensor) for i in items)

    def call(self, batch: Any, *, otherwise: bool = False) -> Call:
        """The call that a batch stands for, or the other one that a list may stand for."""
        if isinstance(batch, Mapping) and self._binds(batch):
            return Call((), {**batch})
        if not isinstance(batch, list | tuple):
            return Call((batch,), {})
        is_one = isinstance(batch, list) and not self.requires(batch) and all(map(_is_map, batch))
        return Call((batch,), {}) if is_one != otherwise else Call(self._positional(batch), {})

    def _binds(self, batch: Mapping[Any, Any]) -> bool:
        try:
            self._signature.bind(**batch)
        except TypeError:
            return False
        return True

    def _positional(self, items: Sequence[Any]) -> tuple[Any, ...]:
        sure = max(1, self._required)
        taken = [*items[:sure]]
        for item in items[sure : self._most]:
            if not any(t.is_floating_point() or t.dtype == torch.bool for t in tensors(item)):
                break
            taken.append(item)
        return tuple(taken)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
