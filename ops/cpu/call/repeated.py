"""Arguments of repeated calls, built without checking and describing each call again."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.c_arguments import Call, Words


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
        parts += [tuple(args[i]) for i in self._sequences]
        parts += [len(args[i]) for i in self._lists]
        return tuple(parts)


class RepeatedCall:
    """Makes the C arguments of calls with a known layout without describing them again.

    Args:
        tensors: the arguments that are tensors.
        call, arguments: of the first call.

    Attributes:
        results: sizes, strides and dtypes.
        gives: what the operator returns: a tensor, several, or None.

    Raises:
        KeyError: tensors were copied or created for the call, which can then not be repeated.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        call: Call,
        arguments: Sequence[int | Tensor | Words],
    ) -> None:
        made = call.results()
        index = {id(t): i for i, t in enumerate((*tensors, *made))}
        self._templates: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                self._templates.append(index[id(argument)])
            elif isinstance(argument, int):
                self._templates.append(ctypes.c_int64(argument))
            else:
                numbers = [word if isinstance(word, int) else 0 for word in argument]
                tensors_in = [(i, *w) for i, w in enumerate(argument) if not isinstance(w, int)]
                places = [(i, index[id(t)], offset) for i, t, offset in tensors_in]
                self._templates.append((struct.Struct(f"={len(numbers)}q"), numbers, places))
        self.results = [(t.shape, t.stride(), t.dtype) for t in made]
        self.gives = type(call.result)

    def arguments(self, tensors: Sequence[Tensor | None], results: Sequence[Tensor]) -> list[Any]:
        addresses = [0 if t is None else t.data_ptr() for t in (*tensors, *results)]
        arguments: list[Any] = []
        for template in self._templates:
            if isinstance(template, int):
                arguments.append(ctypes.c_void_p(addresses[template]))
            elif isinstance(template, tuple):
                packer, numbers, places = template
                words = numbers.copy()
                for i, tensor, offset in places:
                    words[i] = addresses[tensor] + offset
                arguments.append(packer.pack(*words))
            else:
                arguments.append(template)
        return arguments
