"""Neighborhood attention in one, two and three dimensions, with NATTEN's names and semantics.

https://arxiv.org/abs/2204.07143. The functions in ``functional.py`` check arguments and choose a
backend; ``modules.py`` has the layers; the other files are backends and code they share.
"""

from __future__ import annotations

from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.as_natten import correct_dinat, install_as_natten
from ops.neighborhood.functional import BACKENDS, na1d, na2d, na3d
from ops.neighborhood.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from ops.neighborhood.split import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
)

__all__ = [
    "BACKENDS",
    "Inputs",
    "NAParams",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "correct_dinat",
    "install_as_natten",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
]
