"""The smaller and the larger of two sizes, which may be symbolic."""

from __future__ import annotations

import torch

__all__ = ["larger", "smaller"]

# Numbers are compared by Python: the compiler of torch 2.8 takes those of torch for symbols only.


def smaller(a: int, b: int) -> int:
    """min(a, b); a symbol for symbols."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def larger(a: int, b: int) -> int:
    """max(a, b); a symbol for symbols."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)
