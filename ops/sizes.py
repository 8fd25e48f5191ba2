"""Minimum and maximum of two sizes, which may be symbolic."""

from __future__ import annotations

import torch

# Plain integers use Python's min and max: the compiler of torch 2.8 accepts torch.sym_min and
# torch.sym_max for symbols only.


def smaller(a: int, b: int) -> int:
    """min(a, b); symbolic if ``a`` or ``b`` is."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def larger(a: int, b: int) -> int:
    """max(a, b); symbolic if ``a`` or ``b`` is."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)
