"""Decisions between kernels and their reasons; the rules are in :mod:`ops.cpu.policy`."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec

from ops.cpu.instruction_sets import instruction_set


class Decision(NamedTuple):
    """A consulted rule and its answer.

    Attributes:
        arguments: its arguments by name.
        reason: the reason, with the values compared.
        outcome: what computes the layer.
        instruction_set: the instruction set that the rule was applied to.
    """

    rule: str
    arguments: Mapping[str, Any]
    answer: bool
    reason: str
    outcome: str
    instruction_set: str

    def __str__(self) -> str:
        words = [self.reason, self.instruction_set]
        dtype = self.arguments.get("dtype")
        if dtype is not None:
            words.insert(1, _format(dtype))
        return f"{self.rule}: {', '.join(words)} → {self.outcome}"


class Verdict(NamedTuple):
    """The answer of a rule, and why.

    The reason contains the rule's arguments and ``limit`` in braces. It is formatted only on
    demand, since rules are consulted in every call of a layer.
    """

    answer: bool
    reason: str
    limit: Any = None


class _Thread(threading.local):
    observer: Callable[[Decision], object] | None = None


_thread = _Thread()
P = ParamSpec("P")


@contextmanager
def observe_decisions(observer: Callable[[Decision], object]) -> Iterator[None]:
    """Context in which ``observer`` is called with each rule that this thread consults."""
    before, _thread.observer = _thread.observer, observer
    try:
        yield
    finally:
        _thread.observer = before


def rule(yes: str, no: str) -> Callable[[Callable[P, Verdict]], Callable[P, bool]]:
    """Decorator for rules: ``yes`` or ``no`` names what computes the layer."""

    def decorate(function: Callable[P, Verdict]) -> Callable[P, bool]:
        @functools.wraps(function)
        def decide(*args: P.args, **kwargs: P.kwargs) -> bool:
            verdict = function(*args, **kwargs)
            if _thread.observer is not None:
                bound = inspect.signature(function).bind(*args, **kwargs).arguments
                values = {name: _format(value) for name, value in bound.items()}
                reason = verdict.reason.format(limit=_format(verdict.limit), **values)
                _thread.observer(
                    Decision(
                        function.__name__,
                        bound,
                        verdict.answer,
                        reason,
                        yes if verdict.answer else no,
                        instruction_set(),
                    )
                )
            return verdict.answer

        return decide

    return decorate


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return "×".join(map(str, value))
    return "∞" if value == sys.maxsize else str(value).removeprefix("torch.")
