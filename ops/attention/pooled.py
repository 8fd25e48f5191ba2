"""Multi-head attention to averaged runs of tokens: the E-MHSA of Next-ViT, MedViT and MedViTV2.

https://arxiv.org/abs/2207.05501, https://arxiv.org/abs/2302.09462, https://arxiv.org/abs/2502.13693.
"""

from __future__ import annotations

from torch import Tensor, nn

from ops.arguments import checked
from ops.attention.softmax import softmax_attention
from ops.reparam import fold_norm_before
from ops.sizes import smaller

__all__ = ["PooledAttention", "pool_tokens"]


@checked(ranks={"x": 3})
def pool_tokens(x: Tensor, length: int) -> Tensor:
    """Average runs of consecutive tokens; a remainder is dropped.

    Runs are along the sequence, not squares of the map it may come from. A sequence shorter than
    ``length`` becomes one token.

    Args:
        x: (B, N, dim).
        length: tokens in a run.

    Returns:
        (B, max(1, N // length), dim).

    Raises:
        ValueError: ``length`` below 1.
    """
    if length < 1:
        raise ValueError(f"length must be 1 or more, got {length}")
    length = smaller(length, x.shape[1])
    count = x.shape[1] // length
    return x[:, : count * length].unflatten(1, (count, length)).mean(2)


class PooledAttention(nn.Module):
    """Multi-head attention of all tokens to pooled ones, see :func:`pool_tokens`.

    (B, N, dim) → (B, N, dim).

    Args:
        dim: channels.
        num_heads: heads.
        sr_ratio: keys and values are computed from batch-normalised runs of ``sr_ratio ** 2``
            tokens; if 1, from the tokens themselves without a norm.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {num_heads} heads for {dim} channels")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.norm: nn.Module = nn.BatchNorm1d(dim) if sr_ratio > 1 else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        pooled = pool_tokens(x, self.sr_ratio**2) if self.sr_ratio > 1 else x
        pooled = self.norm(pooled.flatten(0, 1)).view(pooled.shape)
        query, key, value = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)
            for t in (self.q(x), self.k(pooled), self.v(pooled))
        )
        out = softmax_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))

    def fuse(self) -> PooledAttention:
        """Fold the norm into the projections of keys and values."""
        if isinstance(self.norm, nn.BatchNorm1d):
            self.k = fold_norm_before(self.norm, self.k)
            self.v = fold_norm_before(self.norm, self.v)
            self.norm = nn.Identity()
        return self

    def fold_norm(self, norm: nn.BatchNorm2d) -> None:
        """Fold a batch norm of the input, which commutes with the averages."""
        self.fuse()
        self.q = fold_norm_before(norm, self.q)
        self.k = fold_norm_before(norm, self.k)
        self.v = fold_norm_before(norm, self.v)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}"
