"""The shapes and contenders of ``benchmark_na.py``: our backends and alternatives.

Neighborhood attention: https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import neighborhood
from ops.neighborhood import na1d, na2d, na3d

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

NUM_HEADS = 4


@dataclass(frozen=True)
class Setting:
    """The sizes of a call: map, window and head dim, without heads and batch."""

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dim: int
    dilation: int = 1

    @property
    def name(self) -> str:
        size, kernel_size = ("x".join(map(str, v)) for v in (self.size, self.kernel_size))
        if len(set(self.kernel_size)) == 1:
            kernel_size = str(self.kernel_size[0])
        dilated = f"-dilation{self.dilation}" if self.dilation > 1 else ""
        return f"{size}-k{kernel_size}-d{self.dim}{dilated}"

    @property
    def tokens(self) -> int:
        return math.prod(self.size)

    def flops(self, batch: int, backward: bool) -> int:
        """FLOPs of the two forward products, plus the five backward products with ``backward``."""
        product = 2 * batch * NUM_HEADS * self.tokens * math.prod(self.kernel_size) * self.dim
        return product * (7 if backward else 2)


SETTINGS = [
    *(Setting((n, n), (7, 7), dim) for n in (56, 28, 14) for dim in (32, 64)),
    Setting((128, 128), (13, 13), 32),
    Setting((64, 64), (7, 7), 32, dilation=4),
    Setting((4096,), (63,), 32),
    Setting((8, 28, 28), (3, 7, 7), 32),
]


class CannotRunError(Exception):
    """A contender does not support a setting; the message says why."""


def visible(setting: Setting, query: Tensor, key: Tensor) -> Tensor:
    """Whether each query attends to each key, given flat indices; elementwise."""
    seen = query == query
    for n, k in zip(reversed(setting.size), reversed(setting.kernel_size), strict=True):
        d = setting.dilation
        place, key_place = query % n // d, key % n // d
        group_size = (n - query % n % d + d - 1) // d
        start = torch.minimum((place - k // 2).clamp(min=0), group_size - k)
        seen = seen & (query % n % d == key % n % d)
        seen = seen & (key_place >= start) & (key_place < start + k)
        query, key = query // n, key // n
    return seen


def backend(name: str, setting: Setting) -> Attention:
    """One of our backends."""
    attention = (na1d, na2d, na3d)[len(setting.size) - 1]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        try:
            return attention(
                query, key, value, setting.kernel_size, dilation=setting.dilation, backend=name
            )
        except NotImplementedError as error:
            raise CannotRunError(str(error)) from error

    return run


def split_pair(setting: Setting, library: ModuleType | None) -> Attention:
    """The scores, a softmax, and the sums of values: ours, or those of a NATTEN that has them."""
    rank = len(setting.size)
    qk = getattr(library, f"na{rank}d_qk", None)
    av = getattr(library, f"na{rank}d_av", None)
    window = {"kernel_size": setting.kernel_size, "dilation": setting.dilation}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if qk is None or av is None:
            raise CannotRunError("the installed NATTEN, if any, is not one of 0.15 to 0.19")
        query, key, value = (t.movedim(-2, 1) for t in (query, key, value))
        attn = qk(query * setting.dim**-0.5, key, **window).softmax(-1)
        out: Tensor = av(attn, value, **window)
        return out.movedim(1, -2)

    return run


def old_natten() -> ModuleType | None:
    """NATTEN's functions, if it is installed."""
    # Releases before 0.20 import this name, which newer versions of torch have moved.
    if not hasattr(torch.cuda, "_device_t"):
        torch.cuda._device_t = torch.types.Device  # type: ignore[attr-defined]
    try:
        return importlib.import_module("natten.functional")
    except ImportError:
        return None


def masked_sdpa(setting: Setting, device: torch.device) -> Attention:
    """torch's attention over all pairs with a mask."""
    index = torch.arange(setting.tokens, device=device)
    mask = visible(setting, index[:, None], index)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def compiled_flex(setting: Setting, device: torch.device) -> Attention:
    """torch's flex attention, compiled, skipping fully masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(setting, query, key)

    n = setting.tokens
    blocks = create_block_mask(mask, None, None, n, n, device=device.type)
    # Otherwise torch stops compiling after some settings and runs it eagerly.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if device.type == "cpu" and query.requires_grad:
            raise CannotRunError("flex attention has no backward on the CPU")
        q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
        out = compiled(q, k, v, block_mask=blocks)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def contender(name: str, setting: Setting, device: torch.device) -> Attention:
    """The contender of this name, set up for a setting."""
    if name == "sdpa-mask":
        return masked_sdpa(setting, device)
    if name == "flex":
        return compiled_flex(setting, device)
    if name == "split":
        return split_pair(setting, neighborhood)
    if name == "natten-split":
        return split_pair(setting, old_natten())
    # The reference gathers the window of every query.
    return backend("reference" if name == "gather" else name, setting)


CONTENDERS = (
    "cpu",
    "triton",
    "split",
    "tiled",
    "gather",
    "sdpa-mask",
    "flex",
    "natten",
    "natten-split",
)


def needed_gib(name: str, setting: Setting, batch: int, device: torch.device) -> float:
    """A lower bound of a contender's memory, if it is large."""
    pairs = batch * NUM_HEADS * setting.tokens**2 * 4
    gathered = setting.tokens * math.prod(setting.kernel_size) * setting.dim
    of_contender = {
        "gather": 2 * batch * NUM_HEADS * gathered * 4,
        "sdpa-mask": 5 * setting.tokens**2,
        # Without kernels, NATTEN computes all pairs.
        "natten": 2 * pairs if device.type == "cpu" else 0,
    }
    return of_contender.get(name, 0) / 2**30
