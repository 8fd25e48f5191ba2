"""Kolmogorov-Arnold layers with sums of reflectional switch functions.

Kolmogorov-Arnold networks, https://arxiv.org/abs/2404.19756, with the basis of FasterKAN, as in
MedViTV2, https://arxiv.org/abs/2502.13693.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ops.arguments import checked

__all__ = ["KAN", "KANLayer", "reflectional_switch"]


@checked(ranks={"grid": 1})
def reflectional_switch(x: Tensor, grid: Tensor, width: float = 0.33) -> Tensor:
    """Basis functions ``1 - tanh²((x - grid) / width)``, a bump around each grid point.

    Args:
        x: (…).
        grid: (num_grids,).
        width: of the bumps; larger is smoother.

    Returns:
        (…, num_grids), in 0 … 1.

    Raises:
        ValueError: ``width`` is 0.
    """
    if width == 0:
        raise ValueError("width must not be 0")
    return 1 - torch.tanh((x.unsqueeze(-1) - grid) * (1 / width)).square()


class KANLayer(nn.Module):
    """LayerNorm, :func:`reflectional_switch` on a fixed grid, and a linear map without bias.

    (…, in_features) → (…, out_features).

    Args:
        in_features, out_features: channels.
        num_grids: grid points, evenly spaced over ``grid_range``, ends included.
        grid_range: range of the normalised input covered by the grid.
        width: of the bumps.

    Raises:
        ValueError: fewer than 2 grid points, an empty range, a width that is not positive.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_grids: int = 8,
        grid_range: tuple[float, float] = (-2.0, 2.0),
        width: float = 0.33,
    ) -> None:
        super().__init__()
        if num_grids < 2 or grid_range[0] >= grid_range[1] or width <= 0:
            raise ValueError(
                "num_grids must be 2 or more, grid_range ascending and width positive, got "
                f"{num_grids}, {grid_range} and {width}"
            )
        self.width = width
        self.norm = nn.LayerNorm(in_features)
        # A parameter without gradient, as in published checkpoints.
        self.grid = nn.Parameter(torch.linspace(*grid_range, num_grids), requires_grad=False)
        self.linear = nn.Linear(in_features * num_grids, out_features, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(reflectional_switch(self.norm(x), self.grid, self.width).flatten(-2))

    def extra_repr(self) -> str:
        return f"num_grids={len(self.grid)}, width={self.width}"


class KAN(nn.Sequential):
    """A sequence of :class:`KANLayer`: (…, dims[0]) → (…, dims[-1]).

    Args:
        dims: widths, two or more.
        num_grids, grid_range, width: as in :class:`KANLayer`.

    Raises:
        ValueError: fewer than two widths, or invalid arguments of :class:`KANLayer`.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_grids: int = 8,
        grid_range: tuple[float, float] = (-2.0, 2.0),
        width: float = 0.33,
    ) -> None:
        if len(dims) < 2:
            raise ValueError(f"dims must name two widths or more, got {tuple(dims)}")
        super().__init__(
            *(
                KANLayer(dims[i], dims[i + 1], num_grids, grid_range, width)
                for i in range(len(dims) - 1)
            )
        )
