"""Neighborhood attention in one, two and three dimensions, with the meaning and names of NATTEN.

https://arxiv.org/abs/2204.07143. Functions are in ``functional.py``, which checks arguments and
chooses a backend; layers in ``modules.py``; every other file is a backend or what backends share.
"""

from __future__ import annotations

from ops.neighborhood._geometry import NAParams
from ops.neighborhood.functional import BACKENDS, na1d, na2d, na3d
from ops.neighborhood.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__all__ = [
    "BACKENDS",
    "NAParams",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "na1d",
    "na2d",
    "na3d",
]
