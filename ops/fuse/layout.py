"""Words of memory that change with an object: what is known of CPython's and torch's layouts.

A call of a network leaves the caches full of weights, so that each object that is looked at costs a
trip to memory. What tells changes is therefore compared word by word at addresses known beforehand,
many trips at a time and page by page. Each layout is found or tested when this module is imported;
of one that is not as known, there are no words, and objects are compared one by one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "changed_dictionary",
    "content_of_cell",
    "first_value",
    "words_of_bases",
    "words_of_cell",
    "words_of_dict",
    "words_of_list",
    "words_of_names",
    "words_of_object",
    "words_of_tensor",
]

# Depth, address and value. Those of depth 0 are in objects that are kept; the others are at the
# known place only if words of a lower depth have not changed.
Word = tuple[int, int, int]
Words = list[Word]

_MOST_DIMS = 5  # of a tensor that has its strides in its TensorImpl
_COUNT, _KEYS, _VALUES = 2, 4, 5  # the words of dictionaries that hold these
_MOST_SLOTS = 31  # where values are apart from keys, which an object's dictionary shares
_MANY = 64  # stores to an attribute, after which Python has specialised their instruction
_SIZE, _ITEMS = 2, 3  # of lists
_CONTENT = 2  # of cells
_CLASS, _DICTIONARY = 1, -3  # of any object


def words_of_dict(held: dict[str, Any], ignored: Collection[str] = ()) -> Words | None:
    """Words, one of which changes if a dictionary holds another value or another number of them."""
    head = _read(id(held), _VALUES + 1)
    if _VERSION:
        return [(1, id(held) + 8 * _VERSION, head[_VERSION])]
    if head[_COUNT] != len(held):
        return None
    words = [(1, id(held) + 8 * i, head[i]) for i in (_COUNT, _KEYS, _VALUES)[: 3 if held else 1]]
    watched = [value for name, value in held.items() if name not in ignored]
    found = _slots(held, head, watched)
    return None if found is None else words + found


def words_of_names(held: dict[str, Any], names: Collection[str]) -> Words | None:
    """Words, one of which changes if a dictionary holds another value under these names."""
    head = _read(id(held), _VALUES + 1)
    if head[_COUNT] != len(held) or not held.keys() >= {*names}:
        return None
    found = _slots(held, head, [held[name] for name in names])
    words = [(1, id(held) + 8 * i, head[i]) for i in (_KEYS, _VALUES)]
    return None if found is None else words + found


def _slots(held: dict[str, Any], head: Any, watched: Collection[Any]) -> Words | None:
    """The words that hold values."""
    if not watched:
        return []
    wanted = {*map(id, watched)}
    if not head[_VALUES]:
        size = (held.__sizeof__() - {}.__sizeof__()) // 8
        words = _read(head[_KEYS], size)
        found = [(2, head[_KEYS] + 8 * i, word) for i, word in enumerate(words) if word in wanted]
        return found if len(found) >= len(watched) else None
    found = []
    for address in range(head[_VALUES], head[_VALUES] + 8 * _MOST_SLOTS, 8):
        (word,) = _read(address, 1)
        if word in wanted:
            found.append((2, address, word))
        if len(found) == len(watched):
            return found
    return None


def words_of_list(held: list[Any]) -> Words | None:
    """Words, one of which changes if a list holds something else."""
    if not _LISTS_ARE_KNOWN:
        return None
    return _list_words(held)


def _list_words(held: list[Any]) -> Words:
    head = _read(id(held), _ITEMS + 1)
    words = [(1, id(held) + 8 * i, head[i]) for i in (_SIZE, _ITEMS)]
    items = _read(head[_ITEMS], len(held)) if held else ()
    return words + [(2, head[_ITEMS] + 8 * i, item) for i, item in enumerate(items)]


def content_of_cell(cell: Any) -> Any:
    """The variable of a closure; the cell itself if it is not assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def words_of_cell(cell: Any) -> Words | None:
    """The word that changes if a variable of a closure is assigned to."""
    where, content = id(cell) + 8 * _CONTENT, content_of_cell(cell)
    known = _read(where, 1)[0] == id(content)
    return [(0, where, id(content))] if known else None


def words_of_object(value: Any, held: dict[str, Any]) -> Words | None:
    """Words, one of which changes if an object gets another class or dictionary than ``held``."""
    offset = type(value).__dictoffset__
    where = id(value) + (offset if offset > 0 else 8 * _DICTIONARY)
    if not _CLASS_IS_KNOWN or _read(where, 1)[0] != id(held):
        return None
    return [(0, id(value) + 8 * _CLASS, id(type(value))), (0, where, id(held))]


def words_of_bases(kind: type) -> Words | None:
    """The word that changes if a class, or one of its bases, gets other bases."""
    return [(0, id(kind) + 8 * _BASES, id(kind.__mro__))] if _BASES else None


def words_of_tensor(tensor: Tensor) -> Words | None:
    """Words, one of which changes if a tensor is modified, or gets other memory or strides."""
    if _LAYOUT is None or tensor.ndim > _MOST_DIMS:
        return None
    return [*_LAYOUT.words(tensor), *first_value(tensor)]


def first_value(tensor: Tensor) -> Words:
    """The word of memory that holds a tensor's first value, if it has one."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return []
    where = tensor.data_ptr() & -8
    return [(2, where, _read(where, 1)[0])]


class _Layout(NamedTuple):
    """Which 8-byte words of torch's objects tell that a tensor has changed."""

    impl: int  # of Python's tensor: its TensorImpl
    storage: int  # of the TensorImpl: its StorageImpl,
    offset: int  # its offset in it, which its number of values follows,
    strides: int  # the first of its strides, of which few are in it,
    counter: int  # its version counter; 0 for tensors created in inference mode
    data: int  # of the StorageImpl: its memory
    version: int  # of the version counter: the version

    def words(self, tensor: Tensor) -> Iterator[Word]:
        """The words of a tensor."""
        impl, storage = tensor._cdata, tensor.untyped_storage()._cdata
        counter = _read(impl)[self.counter]
        objects = [(id(tensor), self.impl), (impl, self.storage), (impl, self.offset)]
        objects += [(impl, self.offset + 1), (storage, self.data), (impl, self.counter)]
        objects += [(impl, self.strides + i) for i in range(tensor.ndim)]
        objects += [(counter, self.version)] if counter else []
        for address, word in objects:
            yield int(address != id(tensor)), address + 8 * word, _read(address)[word]


def _read(address: int, count: int = 20) -> Any:
    return (ctypes.c_int64 * count).from_address(address)


@torch.inference_mode(False)
def _find_layout() -> _Layout | None:
    """The layout of this torch, found on tensors that differ in one thing; None if in doubt."""
    memory = [torch.zeros(987, device="cpu") for _ in range(8)]
    tensors = [m[654:] for m in memory]
    first, impl, storage = tensors[0], tensors[0]._cdata, memory[0].untyped_storage()._cdata
    spread = first.as_strided((7, 5), (23, 2))
    # A detached tensor shares the version counter and the storage; all others have their own.
    detached, *others = (_read(t._cdata) for t in (first.detach(), *tensors))
    own = [i for i, words in enumerate(zip(*others, strict=True)) if len({*words}) == len(words)]
    counters = [i for i in own if detached[i] == others[0][i] != storage]
    found = [
        _places(impl, id(first), 8),
        _places(storage, impl),
        [i for i in _places(654, impl) if _read(impl)[i + 1] == first.numel()],
        [i for i in _places(23, spread._cdata) if _read(spread._cdata)[i + 1] == 2],
        counters,
        _places(memory[0].data_ptr(), storage, 8)[:1],  # what frees the memory knows it, too
    ]
    if any(len(places) != 1 for places in found):
        return None
    counter = _read(impl)[counters[0]]
    versions = _versions(first, counter)
    first.zero_()
    versions &= _versions(first, counter)
    return _Layout(*(places[0] for places in found), *versions) if len(versions) == 1 else None


def _versions(tensor: Tensor, counter: int) -> set[int]:
    """The words that may be the version, whose upper half is padding."""
    words = enumerate(_read(counter, 3))
    return {i for i, word in words if word & 0xFFFFFFFF == tensor._version}


def _places(value: int, address: int, count: int = 20) -> list[int]:
    return [i for i, word in enumerate(_read(address, count)) if word == value]


def changed_dictionary(*, of_object: bool) -> tuple[dict[Any, Any], list[Callable[[], object]]]:
    """A dictionary, perhaps of an object's attributes, and what changes it in every way in turn."""
    probe: Any = type("Probe", (), {})()
    probe.first = probe.second = None
    held = vars(probe) if of_object else {"first": None, "second": None}
    put = functools.partial(setattr, probe) if of_object else held.__setitem__
    changes: list[Callable[[], object]] = [lambda: put("first", object())] * _MANY
    changes += [lambda: put("third", 0), lambda: held.pop("second")]
    return held, [*changes, lambda: held.update(first=1), held.clear]


def _find_version() -> int:
    """The word of dictionaries that no change leaves as it was; 0 in a Python without."""
    found = {*range(_COUNT, _VALUES + 1)}
    for of_object in (True, False):
        held, changes = changed_dictionary(of_object=of_object)
        for change in changes:
            before = [*_read(id(held), _VALUES + 1)]
            change()
            after = _read(id(held), _VALUES + 1)
            found -= {i for i in found if before[i] == after[i]}
    return min(found, default=0)


def _lists_are_known() -> bool:
    held: list[Any] = [object(), object(), object()]
    before = _read(id(held), _ITEMS + 1)
    return before[_SIZE] == 3 and [w for *_, w in _list_words(held)][2:] == [*map(id, held)]


_LAYOUT = _find_layout()
_VERSION = _find_version()
_LISTS_ARE_KNOWN = _lists_are_known()
_BASES = next(iter(_places(id(_Layout.__mro__), id(_Layout), 60)), 0)
_CLASS_IS_KNOWN = _read(id(_LISTS_ARE_KNOWN), 2)[_CLASS] == id(bool)
