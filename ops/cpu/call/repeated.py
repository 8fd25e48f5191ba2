"""Arguments of repeated calls, built without checking and describing each call again."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.c_arguments import Call, pack


class Signature:
    """Which arguments are tensors, and the layout key of a call."""

    def __init__(self, types: Sequence[str]) -> None:
        self._single = [i for i, kind in enumerate(types) if kind in ("Tensor", "Tensor?")]
        self._lists = [i for i, kind in enumerate(types) if kind == "Tensor[]"]
        others = [i for i in range(len(types)) if i not in (*self._single, *self._lists)]
        self._values = [i for i in others if not types[i].endswith("[]")]
        self._sequences = [i for i in others if types[i].endswith("[]")]

    def tensors(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The tensors, single arguments before those in lists."""
        found = [args[i] for i in self._single]
        for i in self._lists:
            found += args[i]
        return found

    def layout(self, args: Sequence[Any], tensors: Sequence[Tensor | None]) -> Hashable:
        parts: list[Any] = [torch.get_num_threads()]
        for t in tensors:
            parts += (None,) if t is None else (t.shape, t.stride(), t.dtype)
        parts += [args[i] for i in self._values]
        for i in self._sequences:
            parts.append(tuple(args[i]))
        for i in self._lists:
            parts.append(len(args[i]))
        return tuple(parts)


class RepeatedCall:
    """Makes the C arguments of calls with a known layout without describing them again.

    Args:
        templates: one per argument: a constant, the index of a pointer among the words of
            :meth:`arguments`, or a packer with the words that it packs.
        shifted: the index and the offset in bytes of each word that points inside a tensor.
        constants: words that are numbers.
        results: sizes, strides and dtypes.
        gives: what the operator returns: a tensor, several, or None.
    """

    def __init__(
        self,
        templates: Sequence[Any],
        shifted: Sequence[tuple[int, int]],
        constants: Sequence[int],
        results: Sequence[tuple[Any, ...]],
        gives: type,
    ) -> None:
        self._templates, self._shifted, self._constants = templates, shifted, list(constants)
        self.results, self.gives = results, gives

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor | None], call: Call, arguments: Sequence[Any]
    ) -> RepeatedCall | None:
        """None if tensors were copied or created for the call, which can then not be repeated."""
        results = call.results()
        if not arguments:
            return None
        known = [*tensors, *results]
        index = {id(t): i for i, t in enumerate(known)}
        given = [a for a in arguments if isinstance(a, Tensor)]
        mixed = [a for a in arguments if _has_addresses(a)]
        pointers = [word for words in mixed for word in words if not isinstance(word, int)]
        if any(id(t) not in index for t in (*given, *(t for t, _ in pointers))):
            return None
        shifted = sorted({(index[id(t)], offset) for t, offset in pointers if offset})
        constants = sorted({word for words in mixed for word in words if isinstance(word, int)})
        place: dict[Any, int] = {(i, 0): i for i in range(len(known))}
        for key in (*shifted, *constants):
            place[key] = len(place)
        templates: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                templates.append(index[id(argument)])
            elif _has_addresses(argument):
                keys = [w if isinstance(w, int) else (index[id(w[0])], w[1]) for w in argument]
                pick = operator.itemgetter(*(place[key] for key in keys), 0)
                templates.append((struct.Struct(f"={len(keys)}q"), pick))
            else:
                templates.append(pack(argument))
        layouts = [(t.shape, t.stride(), t.dtype) for t in results]
        return cls(templates, shifted, constants, layouts, type(call.result))

    def arguments(self, tensors: Sequence[Tensor | None], results: Sequence[Tensor]) -> list[Any]:
        words = [0 if t is None else t.data_ptr() for t in (*tensors, *results)]
        words += [words[i] + offset for i, offset in self._shifted]
        words += self._constants
        return [
            t[0].pack(*t[1](words)[:-1])
            if isinstance(t, tuple)
            else ctypes.c_void_p(words[t])
            if isinstance(t, int)
            else t
            for t in self._templates
        ]


def _has_addresses(argument: Any) -> bool:
    return isinstance(argument, list) and not all(isinstance(word, int) for word in argument)
