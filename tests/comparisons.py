"""Comparing a result and its gradients with those of a definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_same_with_gradients(ours: Tensor, theirs: Tensor, tensors: Sequence[Tensor]) -> None:
    """Check that both results are close, and the gradients of the tensors, too."""
    torch.testing.assert_close(ours, theirs)
    generator = torch.Generator().manual_seed(0)
    into = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
    ours_, theirs_ = (torch.autograd.grad(out, tensors, into) for out in (ours, theirs))
    torch.testing.assert_close(ours_, theirs_)
