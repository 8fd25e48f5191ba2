"""Registry of inference forms: the classes that replace layers in ``fuse()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["fast_form", "plain_form", "stands_for"]

Form = TypeVar("Form", bound=type[nn.Module])

_forms: dict[type[nn.Module], list[tuple[Callable[[Any], bool] | None, type[nn.Module]]]] = {}


def stands_for(
    plain: type[nn.Module], *, where: Callable[[Any], bool] | None = None
) -> Callable[[Form], Form]:
    """Register the decorated class, a subclass of ``plain``, as the inference form of ``plain``.

    Args:
        plain: exact class of the layers to replace; its subclasses are other layers.
        where: predicate that selects layers; default: all. Several forms of one class must not
            apply to the same layer.

    Raises:
        TypeError: the form is not a subclass of ``plain``.
    """

    def register(form: Form) -> Form:
        if not issubclass(form, plain):
            raise TypeError(f"{form.__name__} cannot replace a {plain.__name__}")
        form.stands_for = plain  # type: ignore[attr-defined]
        _forms.setdefault(plain, []).append((where, form))
        return form

    return register


def fast_form(module: nn.Module) -> type[nn.Module] | None:
    """The inference form of a layer, if there is one."""
    for where, form in _forms.get(type(module), ()):
        if where is None or where(module):
            return form
    return None


def plain_form(module: nn.Module) -> type[nn.Module] | None:
    """The plain class of a converted layer or model."""
    return vars(type(module)).get("stands_for")
