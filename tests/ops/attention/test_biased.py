"""Window-by-window training of attention with a bias equals plain attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.attention import biased
from ops.attention.biased import attend_in_turn
from ops.attention.window import shift_masks, window_attention


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_gradients_and_theirs() -> None:
    inputs = tensors((3, 2, 4, 3), (3, 2, 5, 3), (3, 2, 5, 3), (2, 4, 5))
    mask = torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0], dtype=torch.float64).expand(4, 5)

    def attend(*inputs: Tensor) -> Tensor:
        return attend_in_turn(*inputs, masks=(mask, None, mask))

    q, k, v, bias = inputs
    masks = torch.stack((mask, torch.zeros_like(mask), mask)).unsqueeze(1)
    wanted = (q @ k.transpose(2, 3) / 3**0.5 + bias + masks).softmax(-1) @ v
    torch.testing.assert_close(attend(*inputs), wanted)
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_find_their_masks(
    rows: int, columns: int, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = (2, rows, columns, 4, 2, 3)
    inputs = tensors(window, window, window, (2, 4, 4))
    masks = shift_masks(2, 1, torch.float64) if shifted else None
    results = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(biased, "_SCORE_BYTES", limit)
        out = window_attention(*inputs, masks)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)
