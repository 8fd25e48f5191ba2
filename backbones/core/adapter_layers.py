"""The layers of a ViT-Adapter, see :class:`backbones.ViTAdapter`.

Zhe Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023,
https://arxiv.org/abs/2205.08534. The branch is the concatenated pixels of the maps at strides 8, 16
and 32, (B, S, dim) with their ``sizes``; the network's tokens are the pixels of one at stride 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ops.attention.deformable import DeformableAttention, pixel_centres
from ops.batch_norm import BatchNorm2d
from ops.init import init_fan_out

STRIDES = (4, 8, 16, 32)
Sizes = Sequence[tuple[int, int]]


class SpatialPrior(nn.Module):
    """Convolutions of the image, and projections of their maps at strides 4, 8, 16 and 32.

    (B, in_chans, H, W) → four maps (B, dim, ⌈H / stride⌉, ⌈W / stride⌉).

    Args:
        in_chans: image channels.
        hidden_dim: channels at stride 4; twice and four times as many at coarser strides.
        dim: channels of the returned maps.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        widths = (hidden_dim, 2 * hidden_dim, 4 * hidden_dim, 4 * hidden_dim)
        self.stem = nn.Sequential(
            *_conv_norm_act(in_chans, hidden_dim, stride=2),
            *_conv_norm_act(hidden_dim, hidden_dim),
            *_conv_norm_act(hidden_dim, hidden_dim),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.convs = nn.ModuleList(
            nn.Sequential(*_conv_norm_act(widths[i], widths[i + 1], stride=2)) for i in range(3)
        )
        self.projections = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return [project(m) for project, m in zip(self.projections, maps, strict=True)]


def _conv_norm_act(in_chs: int, out_chs: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
    return [conv, BatchNorm2d(out_chs), nn.ReLU(inplace=True)]


class ConvMlp(nn.Module):
    """A feed-forward with a depthwise 3×3 convolution, shared by several maps.

    (B, S, dim), the maps' flattened and concatenated pixels → the same.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        x = to_tokens([self.dwconv(m) for m in to_maps(self.fc1(x), sizes)])
        return self.fc2(self.act(x))


class Injector(nn.Module):
    """Adds features of the branch to the network's tokens, scaled by ``gamma``, initially zero.

    Args:
        dim: channels.
        make_attention: creates a deformable attention from a number of maps.
    """

    def __init__(self, dim: int, make_attention: Callable[[int], DeformableAttention]) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = make_attention(3)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, branch: Tensor, sizes: Sizes) -> Tensor:
        """(B, N, dim) tokens and (B, S, dim) of the branch's ``sizes`` → (B, N, dim)."""
        references = _references(tokens, sizes[1:2])
        attended = self.attn(self.query_norm(tokens), references, self.feat_norm(branch), sizes)
        return tokens + self.gamma * attended


class Extractor(nn.Module):
    """Adds features of the network's tokens to the branch, followed by a feed-forward.

    Args:
        dim: channels.
        make_attention: creates a deformable attention from a number of maps.
        hidden_dim: of the feed-forward.
        drop_path: stochastic depth of the feed-forward.
    """

    def __init__(
        self,
        dim: int,
        make_attention: Callable[[int], DeformableAttention],
        hidden_dim: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = make_attention(1)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvMlp(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, branch: Tensor, tokens: Tensor, sizes: Sizes) -> Tensor:
        """(B, S, dim) of the branch's ``sizes`` and (B, N, dim) tokens → (B, S, dim)."""
        references = _references(branch, sizes)
        branch = branch + self.attn(
            self.query_norm(branch), references, self.feat_norm(tokens), sizes[1:2]
        )
        return branch + self.drop_path(self.ffn(self.ffn_norm(branch), sizes))


class Interaction(nn.Module):
    """The layers around a stage of the network: an injector before it, extractors after it.

    Args:
        injector: see :class:`Injector`.
        extractors: the first one, and those that the last stage has in addition.
    """

    def __init__(self, injector: Injector, extractors: Sequence[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractors[0]
        self.extra_extractors = nn.ModuleList(extractors[1:])


class AdapterLayers(nn.Module):
    """All layers besides the network's; :class:`ViTAdapter` runs them.

    Args:
        prior: the convolutions.
        interactions: one for each stage of the network.
        dim: channels of the maps.
    """

    def __init__(self, prior: SpatialPrior, interactions: Sequence[Interaction], dim: int) -> None:
        super().__init__()
        self.prior = prior
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.interactions = nn.ModuleList(interactions)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(BatchNorm2d(dim) for _ in STRIDES)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation."""
        self.apply(init_fan_out)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.init_weights()
        nn.init.normal_(self.level_embed)
        nn.init.normal_(self.up.weight, std=(2 / (4 * self.up.out_channels)) ** 0.5)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]


def to_tokens(maps: Sequence[Tensor], offsets: Tensor | None = None) -> Tensor:
    """Flattened, concatenated pixels (B, S, dim) of the maps, with a vector added to each map."""
    tokens = [m.flatten(2).transpose(1, 2) for m in maps]
    if offsets is not None:
        tokens = [t + offset for t, offset in zip(tokens, offsets, strict=True)]
    return torch.cat(tokens, dim=1)


def to_maps(tokens: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The contiguous maps (B, dim, h, w) that :func:`to_tokens` flattened."""
    parts = tokens.split([height * width for height, width in sizes], dim=1)
    return [
        part.transpose(1, 2).contiguous().unflatten(2, tuple(size))
        for part, size in zip(parts, sizes, strict=True)
    ]


def _references(queries: Tensor, sizes: Sizes) -> Tensor:
    """The positions of the queries, in float32 or wider."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return pixel_centres(sizes, queries.device, dtype)
