"""The depthwise MLP, tap by tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ops.mlp import DWMlp


def test_definition() -> None:
    torch.manual_seed(0)
    mlp = DWMlp(4, 6).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    hidden = F.pad(mlp.fc1(x), (0, 0, 1, 1, 1, 1))
    weight = mlp.dwconv.weight[:, 0]
    near = sum(
        hidden[:, dy : dy + 3, dx : dx + 5] * weight[:, dy, dx]
        for dy in range(3)
        for dx in range(3)
    )
    expected = mlp.fc2(F.gelu(near + mlp.dwconv.bias))
    torch.testing.assert_close(mlp(x), expected)
