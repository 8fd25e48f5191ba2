"""Feed-forward networks with a depthwise convolution."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["DWMlp"]


class DWMlp(nn.Module):
    """Linear, 3×3 depthwise, GELU, linear: (B, H, W, dim) → (B, H, W, dim).

    The convolution's zero padding encodes the position of the border. Of "PVT v2: Improved
    Baselines with Pyramid Vision Transformer", https://arxiv.org/abs/2106.13797.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(x))))
